// From vectors to what is stored of them: scale, groups and weights of the search (scale.cpp), the search itself, and packing. The
// definition is ops/encode/code.py. A vector's result depends on no other vector, so it is the same in a prompt, in a step, and
// in any batch.
#include <algorithm>
#include <vector>

#include "encode.h"
#include "pool.h"
#include "scale.h"

namespace kvfold {
namespace {

constexpr int64_t kMost = 256, kLeast = 8;  // tokens of a piece of work: codebooks are read for as many
constexpr int64_t kAlone = 256;   // groups of channels that one thread has coded before another is awake

void pack(const int32_t* codes, int64_t count, int bits, uint8_t* to) {
  uint64_t window = 0;
  int filled = 0;
  for (int64_t i = 0; i < count; i++) {
    window |= static_cast<uint64_t>(codes[i]) << filled;
    for (filled += bits; filled >= 8; filled -= 8, window >>= 8) *to++ = static_cast<uint8_t>(window);
  }
  if (filled) *to = static_cast<uint8_t>(window);
}

// What one thread works with, small enough to stay in its caches.
struct Workplace {
  Searcher searcher;
  std::vector<float> vectors;
  std::vector<int32_t> codes;

  Workplace(const Books& books, int64_t beam)
      : searcher(books, beam), vectors(kMost * books.head_dim()), codes(kMost * books.codes()) {}
};

}  // namespace

void code(const CodeCall& call) {
  const ScaleCall& scaling = call.scaling;
  const Books& books = *call.books;
  const int64_t count = books.codes(), bytes = (count * call.bits + 7) / 8, width = books.head_dim();
  const int64_t pairs = scaling.batch * scaling.heads, tokens = scaling.tokens;
  const int threads = pairs * tokens * books.groups < kAlone ? 1 : call.threads;
  int64_t span = kMost;  // a vector's codes do not depend on it
  while (span > kLeast && pairs * ((tokens + span - 1) / span) < 4 * threads) span /= 2;
  const int64_t spans = (tokens + span - 1) / span;
  Lent<Workplace> places(books, call.beam);
  parallel_stretches(threads, pairs * spans, [&](int64_t item) {
    const int64_t pair = item / spans, g = pair % scaling.heads, first = item % spans * span, some = std::min(span, tokens - first);
    Lent<Workplace>::Loan place(places);
    float* const vectors = place->vectors.data();
    int32_t* const codes = place->codes.data();
    scaled_groups(scaling, pair / scaling.heads, g, first, some, vectors);
    for (int64_t p = 0; p < books.groups; p++)
      for (int64_t t = 0; t < some; t += Searcher::kBlock)
        place->searcher.encode(vectors + t * width + p * books.dim, width, std::min(Searcher::kBlock, some - t), g, p, codes + t * count);
    for (int64_t t = 0; t < some; t++)
      pack(codes + t * count, count, call.bits, call.packed + (pair * tokens + first + t) * bytes);
  });
}

}  // namespace kvfold
