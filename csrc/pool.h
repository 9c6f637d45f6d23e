// Work shared out to threads: PyTorch's own OpenMP pool where the process has one, so that the two never compete for cores.
#pragma once

#include <cstdint>
#include <functional>

namespace kvfold {

// Run `work(item)` for items 0..count-1 on up to `threads` threads; items are taken in order as threads become free.
// An exception in `work` is rethrown here after all threads stopped.
void parallel_for(int threads, int64_t count, const std::function<void(int64_t)>& work);

// The same for items whose neighbours read the same memory: every thread begins with a stretch of its own, and takes from those of
// others when it is through.
void parallel_stretches(int threads, int64_t count, const std::function<void(int64_t)>& work);

}  // namespace kvfold
