#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

namespace lct {
namespace {

constexpr int kLooks = 2000;  // at work or at its end, some tens of microseconds in all, before a thread sleeps

struct Job {
  const std::function<void(int64_t)>& body;
  int64_t tasks;
  int places;  // threads that may still join
  std::atomic<int64_t> next{0};
  std::atomic<int> active{0};
  std::exception_ptr error{};

  void work(std::mutex& mutex) {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
    } catch (...) {
      next = tasks;
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

inline void breathe() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  const pid_t process = getpid();

  void run(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
    Job job{body, tasks, threads - 1};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (count_ < threads - 1) {
        std::thread([this] { serve(); }).detach();
        ++count_;
      }
      jobs_.push_back(&job);
      waiting_.store(int(jobs_.size()), std::memory_order_release);
    }
    begun_.notify_all();
    job.work(mutex_);
    std::unique_lock<std::mutex> lock(mutex_);
    forget(&job);
    lock.unlock();
    for (int look = 0; look < kLooks && job.active.load(std::memory_order_acquire); ++look) breathe();
    lock.lock();
    ended_.wait(lock, [&] { return !job.active.load(); });
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (jobs_.empty()) {
        lock.unlock();
        for (int look = 0; look < kLooks && !waiting_.load(std::memory_order_acquire); ++look) breathe();
        lock.lock();
      }
      begun_.wait(lock, [&] { return !jobs_.empty(); });
      Job* job = jobs_.front();
      ++job->active;
      if (--job->places == 0) forget(job);
      lock.unlock();
      job->work(mutex_);
      lock.lock();
      --job->active;
      ended_.notify_all();
      forget(job);  // it has no task left
    }
  }

  // With the mutex held; a job that is gone already is no error, and its address is not looked into.
  void forget(Job* job) {
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
    waiting_.store(int(jobs_.size()), std::memory_order_release);
  }

  std::mutex mutex_;
  std::condition_variable begun_, ended_;
  std::deque<Job*> jobs_;
  std::atomic<int> waiting_{0};
  int count_ = 0;
};

// Of this process: after a fork the child has the object but not its threads, and perhaps its mutex locked for ever.
// Never destroyed, for threads wait on it.
Pool& pool() {
  static std::atomic<Pool*> kept{nullptr};
  Pool* found = kept.load();
  while (!found || found->process != getpid()) {
    Pool* fresh = new Pool;
    if (kept.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

void parallel(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
  threads = int(std::min<int64_t>(threads, tasks));
  if (threads > 1) return pool().run(tasks, threads, body);
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

}  // namespace lct
