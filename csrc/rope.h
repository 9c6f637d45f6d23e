// Keys back to where they stood before RoPE; the definition is ops/rope.py, `unrotate`.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "lanes.h"

namespace kvfold {

// Sines and cosines [2][rotary] of token t of batch row b, over the factor.
inline void sines_of(const Turn& turn, int64_t b, int64_t t, float* sines) {
  const float position = static_cast<float>(turn.positions[b * turn.positions_stride + t]), by = 1 / turn.factor;
  float* const cosines = sines + turn.rotary;
  for (int64_t i = 0; i < turn.rotary; i++) sine_cosine(position * turn.inv_freq[i], &sines[i], &cosines[i]);
  for (int64_t i = 0; i < 2 * turn.rotary; i++) sines[i] *= by;
}

// One key, x [dim] to `to` [dim], which may be the same, with the sines of its token.
inline void turn_back(const Turn& turn, const float* sines, const float* x, int64_t dim, float* to) {
  const int64_t n = turn.rotary, step = turn.interleaved ? 2 : 1, apart = turn.interleaved ? 1 : n;
  const float* const cosines = sines + n;
  for (int64_t i = 0; i < n; i++) {
    const float low = x[step * i], high = x[step * i + apart];
    to[step * i] = low * cosines[i] + high * sines[i];
    to[step * i + apart] = high * cosines[i] - low * sines[i];
  }
  if (x != to) std::copy(x + 2 * n, x + dim, to + 2 * n);
}

}  // namespace kvfold
