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

// Items of a thread's own stretch, and where it has got to.
struct alignas(64) Stretch {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Job {
  const std::function<void(int64_t)>& work;
  std::vector<Stretch> stretches;
  std::atomic<size_t> begun{0};  // threads
  std::mutex guard;
  std::exception_ptr failure;

  Job(int64_t count, int64_t parts, const std::function<void(int64_t)>& work) : work(work), stretches(parts) {
    for (int64_t i = 0; i < parts; i++) {
      stretches[i].next = count * i / parts;
      stretches[i].end = count * (i + 1) / parts;
    }
  }

  void run() {
    const size_t first = begun.fetch_add(1, std::memory_order_relaxed);
    try {
      for (size_t i = 0; i < stretches.size(); i++) {
        Stretch& own = stretches[(first + i) % stretches.size()];
        for (int64_t item; (item = own.next.fetch_add(1, std::memory_order_relaxed)) < own.end;) work(item);
      }
    } catch (...) {
      for (Stretch& stretch : stretches) stretch.next.store(stretch.end);
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

void run(int threads, int64_t useful, Job& job) {
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

}  // namespace

void parallel_for(int threads, int64_t count, const std::function<void(int64_t)>& work) {
  Job job(count, 1, work);
  run(threads, std::min<int64_t>(threads, count), job);
}

void parallel_stretches(int threads, int64_t count, const std::function<void(int64_t)>& work) {
  const int64_t useful = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  Job job(count, useful, work);
  run(threads, useful, job);
}

}  // namespace kvfold
