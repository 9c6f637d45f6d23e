// Vectors divided by their stored scale, cut into groups and weighted, ready for the search; the definition is
// ops/encode/code.py, `scaled_groups`.
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace kvfold {
namespace {

constexpr int64_t kBlock = 64;     // tokens of a piece of work
constexpr int kParts = 8;          // of a sum in double precision
constexpr float kConstant = 1024;  // a vector so many times larger than its spread would leave float16 if divided by it

template <class Term>
double sum_of(int64_t count, Term term) {
  double parts[kParts] = {}, total = 0;
  int64_t j = 0;
  for (; j + kParts <= count; j += kParts)
    for (int i = 0; i < kParts; i++) parts[i] += term(j + i);
  for (; j < count; j++) total += term(j);
  for (double part : parts) total += part;
  return total;
}

// Standard deviation, or the largest magnitude of a vector that is constant but for rounding.
float spread_of(const float* x, int64_t dim) {
  const double mean = sum_of(dim, [&](int64_t j) { return static_cast<double>(x[j]); }) / static_cast<double>(dim);
  const double square = sum_of(dim, [&](int64_t j) { return (x[j] - mean) * (x[j] - mean); });
  const float spread = static_cast<float>(std::sqrt(square / static_cast<double>(dim - 1)));
  float peak = 0;
  for (int64_t j = 0; j < dim; j++) peak = std::max(peak, std::fabs(x[j]));
  return spread * kConstant < peak ? peak : spread;
}

uint16_t half_bits(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

float from_half_bits(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

// `x W`, W [dim][dim].
void weigh(const float* x, const float* weights, int64_t dim, float* to) {
  int64_t c = 0;
  for (; c + 2 * lanes <= dim; c += 2 * lanes) {
    vf first = vf{}, second = vf{};
    for (int64_t j = 0; j < dim; j++) {
      first += x[j] * load(weights + j * dim + c);
      second += x[j] * load(weights + j * dim + c + lanes);
    }
    store(to + c, first);
    store(to + c + lanes, second);
  }
  for (; c < dim; c++) {
    float sum = 0;
    for (int64_t j = 0; j < dim; j++) sum += x[j] * weights[j * dim + c];
    to[c] = sum;
  }
}

}  // namespace

void scaled_groups(const ScaleCall& call) {
  const int64_t blocks = (call.tokens + kBlock - 1) / kBlock, groups = call.groups, dim = call.dim, width = groups * dim;
  const int64_t pieces = call.batch * call.heads * blocks;
  parallel_for(pieces < 2 * call.threads ? 1 : call.threads, pieces, [&](int64_t item) {
    const int64_t pair = item / blocks, first = item % blocks * kBlock, last = std::min(call.tokens, first + kBlock);
    const int64_t b = pair / call.heads, g = pair % call.heads;
    std::vector<float> group(width);
    for (int64_t t = first; t < last; t++) {
      const float* x = call.x + b * call.batch_stride + g * call.head_stride + t * call.token_stride;
      const float spread = spread_of(x, width);
      const int64_t at = pair * call.tokens + t;
      float scale;
      if (call.short_scales) {
        const int bits = (half_bits(std::min(spread, 61440.0f)) + 64) >> 7;  // packing.pack_scale
        call.short_scales[at] = static_cast<uint8_t>(bits);
        scale = from_half_bits(static_cast<uint16_t>(bits << 7));
      } else {
        const uint16_t bits = half_bits(std::min(spread, 65504.0f));
        call.scales[at] = bits;
        scale = from_half_bits(bits);
      }
      const float divisor = scale > 0 ? scale : 1.0f;
      float* to = call.vectors + at * width;
      float* scaled = call.weights ? group.data() : to;
      for (int64_t i = 0; i < width; i++) scaled[i] = x[call.channels[i]] / divisor;
      if (call.weights)
        for (int64_t p = 0; p < groups; p++) weigh(scaled + p * dim, call.weights + (g * groups + p) * dim * dim, dim, to + p * dim);
    }
  });
}

}  // namespace kvfold
