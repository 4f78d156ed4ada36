// Threads that wait for work between calls. Nothing depends on which thread does what.
#pragma once

#include <cstdint>
#include <functional>

namespace lct {

// Calls body(0) … body(tasks − 1), handed out in this order, on the caller's thread and up to threads − 1 others. The
// caller never waits for a thread to wake, only for those that have begun, so that on busy cores, or after a fork, it
// does all by itself. May be called from several threads at once. Rethrows the first exception of `body`.
void parallel(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

}  // namespace lct
