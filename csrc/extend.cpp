#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "pool.h"

namespace kvfold {
namespace {

constexpr int64_t kPiece = 512;  // new tokens

// Copies `count` numbers; whether none has all bits of `exponent`, as NaN and Inf have.
template <class Bits>
bool copy_finite(const Bits* from, Bits* to, int64_t count, Bits exponent) {
  Bits found = 0;
  for (int64_t i = 0; i < count; i++) {
    found |= (from[i] & exponent) == exponent;
    to[i] = from[i];
  }
  return !found;
}

template <class Bits>
bool copy_new(const ExtendCall& call, int64_t b, int64_t g, int64_t first, int64_t stop, Bits exponent) {
  const Bits* from = static_cast<const Bits*>(call.added.data) + b * call.added.batch_stride + g * call.added.head_stride;
  Bits* to = static_cast<Bits*>(call.out) + ((b * call.heads + g) * (call.held.tokens + call.added.tokens) + call.held.tokens) * call.dim;
  bool finite = true;
  for (int64_t t = first; t < stop; t++)
    finite &= copy_finite<Bits>(from + t * call.added.token_stride, to + t * call.dim, call.dim, exponent);
  return finite;
}

void copy_held(const ExtendCall& call, int64_t b, int64_t g) {
  const int64_t wide = call.wide, row = call.dim * wide;
  const char* from = static_cast<const char*>(call.held.data) + (b * call.held.batch_stride + g * call.held.head_stride) * wide;
  char* to = static_cast<char*>(call.out) + (b * call.heads + g) * (call.held.tokens + call.added.tokens) * row;
  if (call.held.token_stride == call.dim)
    std::memcpy(to, from, call.held.tokens * row);
  else
    for (int64_t t = 0; t < call.held.tokens; t++) std::memcpy(to + t * row, from + t * call.held.token_stride * wide, row);
}

}  // namespace

bool extend(const ExtendCall* calls, int64_t count, int threads) {
  if (count == 0) return true;
  const int64_t pairs = calls->batch * calls->heads, pieces = std::max<int64_t>(1, (calls->added.tokens + kPiece - 1) / kPiece);
  std::atomic<bool> finite{true};
  parallel_for(pieces > 1 ? threads : 1, count * pairs * pieces, [&](int64_t item) {
    const ExtendCall& call = calls[item / pieces / pairs];
    const int64_t pair = item / pieces % pairs, b = pair / call.heads, g = pair % call.heads;
    const int64_t first = item % pieces * kPiece, stop = std::min(first + kPiece, call.added.tokens);
    if (first == 0) copy_held(call, b, g);
    const bool fine = call.wide == 4 ? copy_new<uint32_t>(call, b, g, first, stop, static_cast<uint32_t>(call.exponent))
                                     : copy_new<uint16_t>(call, b, g, first, stop, static_cast<uint16_t>(call.exponent));
    if (!fine) finite = false;
  });
  return finite;
}

}  // namespace kvfold
