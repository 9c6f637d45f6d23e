// The search of blocks of vectors, one head and group at a time (encode.cpp), for the ops that share blocks out to threads.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels.h"

namespace kvfold {

// Searches with memory of its own, one block after another.
class Searcher {
 public:
  static constexpr int64_t kBlock = 128;  // vectors of a block at most
  static constexpr int64_t kLanes = 64;  // vectors of a block where there is no matrix unit

  Searcher(const Books& books, int64_t beam);
  ~Searcher();

  // Codes [count][stages][groups], those of group p of KV head g, of `count` vectors `stride` apart.
  void encode(const float* vectors, int64_t stride, int64_t count, int64_t g, int64_t p, int32_t* codes);

 private:
  class Amx;
  void encode_lanes(const float* vectors, int64_t stride, int64_t count, const int32_t* book, int32_t* codes);

  const Books& books_;
  int64_t beam_;
  std::unique_ptr<Amx> amx_;  // null where there is none, or it does not serve
};

// Things lent to one piece of work at a time: there are as many as are at work at once.
template <class Thing>
class Lent {
 public:
  class Loan {
   public:
    explicit Loan(Lent& from) : from_(from), thing_(from.take()) {}
    ~Loan() {
      std::lock_guard<std::mutex> lock(from_.guard_);
      from_.idle_.push_back(std::move(thing_));
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    Thing* operator->() { return thing_.get(); }

   private:
    Lent& from_;
    std::unique_ptr<Thing> thing_;
  };

  Lent(const Books& books, int64_t beam) : books_(books), beam_(beam) {}

 private:
  std::unique_ptr<Thing> take() {
    std::lock_guard<std::mutex> lock(guard_);
    if (idle_.empty()) return std::make_unique<Thing>(books_, beam_);
    std::unique_ptr<Thing> thing = std::move(idle_.back());
    idle_.pop_back();
    return thing;
  }

  const Books& books_;
  int64_t beam_;
  std::mutex guard_;
  std::vector<std::unique_ptr<Thing>> idle_;
};

}  // namespace kvfold
