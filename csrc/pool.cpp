#include "pool.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace kvfold {
namespace {

struct Job {
  int64_t count;
  const std::function<void(int64_t)>& work;
  std::atomic<int64_t> next{0};
  std::mutex guard;
  std::exception_ptr failure;

  Job(int64_t count, const std::function<void(int64_t)>& work) : count(count), work(work) {}

  void run() {
    try {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item);
    } catch (...) {
      next.store(count);
      std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
    }
  }
};

// GNU OpenMP's entry point, as compilers call it. PyTorch loads its libgomp for everyone to see.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel openmp() {
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void parallel_for(int threads, int64_t count, const std::function<void(int64_t)>& work) {
  Job job(count, work);
  const int64_t useful = std::min<int64_t>(threads, count);
  if (useful <= 1) {
    job.run();
  } else if (Parallel parallel = openmp()) {
    // Always the whole team: libgomp ends and starts threads when the size of its team changes.
    parallel([](void* data) { static_cast<Job*>(data)->run(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < useful; i++) others.emplace_back([&job] { job.run(); });
    job.run();
    for (std::thread& other : others) other.join();
  }
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace kvfold
