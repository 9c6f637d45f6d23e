// From vectors to what is stored of them: scale, groups and weights of the search (scale.cpp), the search itself, and packing. The
// definition is ops/encode/code.py. A vector's result depends on no other vector, so it is the same in a prompt, in a step, and
// in any batch.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace kvfold {
namespace {

constexpr int64_t kVectors = 64;  // of a piece of work
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

}  // namespace

void code(const CodeCall& call) {
  ScaleCall scaling = call.scaling;
  const int64_t count = call.books->codes(), bytes = (count * call.bits + 7) / 8;
  const int64_t all = scaling.batch * scaling.heads * scaling.tokens;
  std::vector<float> vectors(all * scaling.groups * scaling.dim);
  std::vector<int32_t> codes(all * count);
  scaling.vectors = vectors.data();
  if (all * scaling.groups < kAlone) scaling.threads = 1;
  scaled_groups(scaling);
  encode({vectors.data(), codes.data(), scaling.batch, scaling.tokens, call.beam, call.books, scaling.threads});
  const int64_t blocks = (all + kVectors - 1) / kVectors;
  parallel_for(blocks < 2 * scaling.threads ? 1 : scaling.threads, blocks, [&](int64_t block) {
    for (int64_t at = block * kVectors; at < std::min((block + 1) * kVectors, all); at++)
      pack(codes.data() + at * count, count, call.bits, call.packed + at * bytes);
  });
}

}  // namespace kvfold
