#include "threads.h"

#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace lct {
namespace {

using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);  // what a compiler calls for `omp parallel`

struct Job {
  const std::function<void(int64_t)>& body;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::mutex mutex{};
  std::exception_ptr error{};

  void work() {
    try {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task);
    } catch (...) {
      next = tasks;
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

void work(void* job) { static_cast<Job*>(job)->work(); }

}  // namespace

void parallel(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
  // Torch makes its OpenMP library's symbols global when it is imported.
  static const auto team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  Job job{body, tasks};
  if (threads < 2 || tasks < 2) {
    job.work();
  } else if (team) {
    team(work, &job, unsigned(threads), 0);  // all of them: another number would end threads and make them anew
  } else {
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
      for (int64_t i = 1; i < threads && i < tasks; ++i) others.emplace_back(work, &job);
    } catch (const std::system_error&) {
    }  // the system gives no more: those that there are do it
    job.work();
    for (std::thread& other : others) other.join();
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace lct
