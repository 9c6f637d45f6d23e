// From vectors to what is stored of them: scale, groups, weights of the search, the search itself, and packing. The definition is
// ops/encode/code.py. A vector's result depends on no other vector, so it is the same in a prompt, in a step, and in
// any batch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attend_parts.h"

namespace kvfold {
namespace {

constexpr int64_t kTokens = 64;         // of a piece of work
constexpr float kConstant = 1024;       // a vector so many times larger than its spread is divided by its peak
constexpr float kLargestHalf = 65504;
constexpr float kLargestShort = 61440;  // the largest half with three bits of mantissa

uint16_t to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

// Bits of the scale as stored, a half's; of a short one, all but the upper eight below the sign are zero.
uint16_t scale_bits(const CodeCall& call, const float* x) {
  double sum = 0, squares = 0;
  float peak = 0;
  for (int64_t i = 0; i < call.dim; i++) {
    sum += x[i];
    peak = std::max(peak, std::fabs(x[i]));
  }
  const double mean = sum / static_cast<double>(call.dim);
  for (int64_t i = 0; i < call.dim; i++) squares += (x[i] - mean) * (x[i] - mean);
  const float spread = static_cast<float>(std::sqrt(squares / static_cast<double>(call.dim - 1)));
  const float scale = spread * kConstant < peak ? peak : spread;
  if (!call.short_scale) return to_half(std::min(scale, kLargestHalf));
  return static_cast<uint16_t>((to_half(std::min(scale, kLargestShort)) + 64) >> 7 << 7);
}

// What the search sees of `x [D]` of KV head `g`, `[P][d]`.
void prepare(const CodeCall& call, int64_t g, const float* x, float scale, float* to) {
  const int64_t d = call.books->dim, groups = call.books->groups;
  const float by = scale > 0 ? scale : 1.0f;
  for (int64_t i = 0; i < call.dim; i++) to[i] = x[call.channels[i]] / by;
  if (!call.weights) return;
  std::vector<float> plain(to, to + call.dim);
  for (int64_t p = 0; p < groups; p++) {
    const float* matrix = call.weights + (g * groups + p) * d * d;
    float* own = to + p * d;
    std::fill_n(own, d, 0.0f);
    for (int64_t i = 0; i < d; i++) {
      const vf by_row = splat(plain[p * d + i]);
      const float* row = matrix + i * d;
      int64_t j = 0;
      for (; j + lanes <= d; j += lanes) store(own + j, load(own + j) + by_row * load(row + j));
      for (; j < d; j++) own[j] += plain[p * d + i] * row[j];
    }
  }
}

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
  const Books& books = *call.books;
  const int64_t rows = call.batch * books.heads, blocks = (call.tokens + kTokens - 1) / kTokens, count = books.codes();
  const int64_t bytes = (count * call.bits + 7) / 8;
  std::vector<float> vectors(rows * call.tokens * call.dim);
  std::vector<int32_t> codes(rows * call.tokens * count);
  const auto each_token = [&](const auto& work) {
    parallel_for(rows * blocks < 2 * call.threads ? 1 : call.threads, rows * blocks, [&](int64_t item) {
      const int64_t row = item / blocks, first = item % blocks * kTokens;
      for (int64_t t = first; t < std::min(first + kTokens, call.tokens); t++) work(row, row * call.tokens + t);
    });
  };
  each_token([&](int64_t row, int64_t at) {
    const float* x = call.vectors + at * call.dim;
    const uint16_t scale = scale_bits(call, x);
    if (call.short_scale)
      static_cast<uint8_t*>(call.scale)[at] = static_cast<uint8_t>(scale >> 7);
    else
      static_cast<uint16_t*>(call.scale)[at] = scale;
    prepare(call, row % books.heads, x, half_to_float(scale), vectors.data() + at * call.dim);
  });
  encode({vectors.data(), codes.data(), call.batch, call.tokens, call.beam, call.books, call.threads});
  each_token([&](int64_t, int64_t at) { pack(codes.data() + at * count, count, call.bits, call.packed + at * bytes); });
}

}  // namespace kvfold
