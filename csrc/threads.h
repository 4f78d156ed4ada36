// The threads of torch's own operations, so that two sets of threads never contend for the same cores.
#pragma once

#include <cstdint>
#include <functional>

namespace lct {

// Calls body(0) … body(tasks − 1), handed out in this order as threads get free. The team is that of the OpenMP library
// that torch has loaded, where there is one that can be called (libgomp); else threads are made for this call. May be
// called from several threads at once. Rethrows the first exception of `body`.
void parallel(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

}  // namespace lct
