// Vectors divided by their stored scale, cut into groups and weighted, ready for the search; the definition is
// ops/encode/code.py, `scaled_groups`.
#include "scale.h"

#include "lanes.h"
#include "rope.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvfold {
namespace {

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

// Standard deviation, or the largest magnitude of a vector that is constant but for rounding; NaN for one with NaN or Inf.
float spread_of(const float* x, int64_t dim) {
  const double mean = sum_of(dim, [&](int64_t j) { return static_cast<double>(x[j]); }) / static_cast<double>(dim);
  const double square = sum_of(dim, [&](int64_t j) { return (x[j] - mean) * (x[j] - mean); });
  const float spread = static_cast<float>(std::sqrt(square / static_cast<double>(dim - 1)));
  float peak = 0;
  for (int64_t j = 0; j < dim; j++) peak = std::max(peak, std::fabs(x[j]));
  return spread * kConstant < peak ? peak : spread;
}

// `x W` of kVectors vectors [..][dim], `stride` apart; W [dim][dim]. Several at once, so that sums need not wait for each other.
constexpr int kVectors = 4;

template <int kCount>
void weigh(const float* x, int64_t stride, const float* weights, int64_t dim, float* to) {
  int64_t c = 0;
  for (; c + 2 * lanes <= dim; c += 2 * lanes) {
    vf sums[kCount][2] = {};
    for (int64_t j = 0; j < dim; j++) {
      const vf low = load(weights + j * dim + c), high = load(weights + j * dim + c + lanes);
      for (int k = 0; k < kCount; k++) {
        sums[k][0] += x[k * stride + j] * low;
        sums[k][1] += x[k * stride + j] * high;
      }
    }
    for (int k = 0; k < kCount; k++) {
      store(to + k * stride + c, sums[k][0]);
      store(to + k * stride + c + lanes, sums[k][1]);
    }
  }
  for (; c < dim; c++)
    for (int k = 0; k < kCount; k++) {
      float sum = 0;
      for (int64_t j = 0; j < dim; j++) sum += x[k * stride + j] * weights[j * dim + c];
      to[k * stride + c] = sum;
    }
}

}  // namespace

bool scaled_groups(const ScaleCall& call, const Stored& to, int64_t b, int64_t g, int64_t first, int64_t count, const float* sines,
                   float* vectors) {
  const int64_t dim = call.dim, width = call.groups * dim;
  std::vector<float> unweighted(call.weights ? count * width : 0), own(call.half || call.turn.positions ? width : 0);
  float* const scaled = call.weights ? unweighted.data() : vectors;
  bool finite = true;
  for (int64_t t = 0; t < count; t++) {
    const int64_t from = b * call.batch_stride + g * call.head_stride + (first + t) * call.token_stride;
    const float* x = static_cast<const float*>(call.x) + from;
    if (call.half) {
      const uint16_t* halves = static_cast<const uint16_t*>(call.x) + from;
      for (int64_t i = 0; i < width; i++) own[i] = from_bfloat16(halves[i]);
      x = own.data();
    }
    if (call.turn.positions) {
      turn_back(call.turn, sines + t * 2 * call.turn.rotary, x, width, own.data());
      x = own.data();
    }
    const float spread = spread_of(x, width);
    finite = finite && std::isfinite(spread);
    float scale = 0;
    if (to.short_scale) {
      const int bits = (to_half(std::min(spread, 61440.0f)) + 64) >> 7;  // packing.pack_scale
      if (to.keeps(first + t)) static_cast<uint8_t*>(to.scale)[to.scale_of(b, g, first + t)] = static_cast<uint8_t>(bits);
      scale = half_to_float(static_cast<uint16_t>(bits << 7));
    } else {
      const uint16_t bits = to_half(std::min(spread, 65504.0f));
      if (to.keeps(first + t)) static_cast<uint16_t*>(to.scale)[to.scale_of(b, g, first + t)] = bits;
      scale = half_to_float(bits);
    }
    const float divisor = scale > 0 ? scale : 1.0f;
    for (int64_t i = 0; i < width; i++) scaled[t * width + i] = x[call.channels[i]] / divisor;
  }
  if (!call.weights) return finite;
  for (int64_t p = 0; p < call.groups; p++) {
    const float* weights = call.weights + (g * call.groups + p) * dim * dim;
    int64_t t = 0;
    for (; t + kVectors <= count; t += kVectors)
      weigh<kVectors>(scaled + t * width + p * dim, width, weights, dim, vectors + t * width + p * dim);
    for (; t < count; t++) weigh<1>(scaled + t * width + p * dim, width, weights, dim, vectors + t * width + p * dim);
  }
  return finite;
}

}  // namespace kvfold
