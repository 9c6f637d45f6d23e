// Scores of a center that is rotated to every key's position (kernels.h, AttendCall::center), for the rows of a decode step.
//
// With (m1, m2) a pair of the center and (q1, q2) of a query, q . R(p) m is the sum over pairs of
//   a cos(p f) + b sin(p f),   a = q1 m1 + q2 m2,   b = q2 m1 - q1 m2,
// f the pair's frequency. For runs of consecutive positions a and b are turned to the first of them; what is left are the cosines and
// sines of j f, j = 0 .. kRun-1, the same for all runs: a small matrix product.
#pragma once

#include "attend_rows.h"
#include "attend_tiles.h"

namespace kvfold {

constexpr int64_t kRun = 64;  // positions; whole lane vectors

// cos(j f) and sin(j f) of every pair, [pairs][2][kRun].
struct CenterTable {
  std::vector<float> inv_freq;
  Aligned<float> waves;

  explicit CenterTable(const AttendCall& call) : inv_freq(call.inv_freq, call.inv_freq + call.rotary), waves(call.rotary * 2 * kRun) {
    for (int64_t i = 0; i < call.rotary; i++)
      for (int64_t j = 0; j < kRun; j++)
        sine_cosine(static_cast<float>(j) * call.inv_freq[i], &waves[(2 * i + 1) * kRun + j], &waves[2 * i * kRun + j]);
  }

  bool fits(const AttendCall& call) const {
    return static_cast<int64_t>(inv_freq.size()) == call.rotary && std::equal(inv_freq.begin(), inv_freq.end(), call.inv_freq);
  }
};

template <int kWidth>
class CenterScores {
 public:
  CenterScores(const CenterTable& table, const AttendCall& call, int64_t b, int64_t g, int64_t first_row, int64_t rows)
      : table_(table), call_(call), positions_(call.positions + b * call.positions_stride) {
    const int64_t n = call.rotary, dim = call.key.dim, all = call.shared * call.queries;
    pairs_.assign(n * 2 * kWidth, 0.0f);
    const float* center = call.center + g * dim;
    for (int64_t r = 0; r < rows; r++) {
      const float* query = call.query + ((b * call.kv_heads + g) * all + first_row + r) * dim;
      for (int64_t i = 0; i < n; i++) {
        const int64_t one = call.interleaved ? 2 * i : i, two = call.interleaved ? 2 * i + 1 : i + n;
        const float by = call.softmax_scale * call.factor;
        pairs_[2 * i * kWidth + r] = by * (query[one] * center[one] + query[two] * center[two]);
        pairs_[(2 * i + 1) * kWidth + r] = by * (query[two] * center[one] - query[one] * center[two]);
      }
      for (int64_t i = 2 * n; i < dim; i++) still_[r] += call.softmax_scale * query[i] * center[i];
    }
  }

  // scores[t][r] = scores[t][r] * scales[t] + q_r . rotated center of key first + t; scales become 1.
  void add(int64_t first, int64_t count, float* scores, float* scales) const {
    for (int64_t t = 0, some; t < count; t += some) {
      const int32_t* at = positions_ + first + t;
      some = 1;
      while (some < kRun && t + some < count && at[some] == at[0] + some) some++;
      float found[kRun * kWidth];
      run(at[0], some, found);
      for (int64_t i = t; i < t + some; i++) {
        for (int64_t r = 0; r < kWidth; r++) scores[i * kWidth + r] = scores[i * kWidth + r] * scales[i] + found[(i - t) * kWidth + r];
        scales[i] = 1;
      }
    }
  }

 private:
  void run(int32_t position, int64_t count, float* found) const {
    const int64_t n = call_.rotary;
    std::vector<float> turned(n * 2 * kWidth);
    for (int64_t i = 0; i < n; i++) {
      float sine, cosine;
      sine_cosine(static_cast<float>(position) * call_.inv_freq[i], &sine, &cosine);
      for (int r = 0; r < kWidth; r++) {
        const float a = pairs_[2 * i * kWidth + r], b = pairs_[(2 * i + 1) * kWidth + r];
        turned[2 * i * kWidth + r] = a * cosine + b * sine;
        turned[(2 * i + 1) * kWidth + r] = b * cosine - a * sine;
      }
    }
    constexpr int kBunch = kWidth == 4 ? 4 : 2;  // lane vectors of positions at a time
    static_assert(kRun % (kBunch * lanes) == 0);
    for (int64_t j = 0; j < count; j += kBunch * lanes) {
      vf acc[kBunch][kWidth];
      for (auto& bunch : acc)
        for (int r = 0; r < kWidth; r++) bunch[r] = splat(still_[r]);
      for (int64_t i = 0; i < 2 * n; i++) {
        vf wave[kBunch];
        for (int w = 0; w < kBunch; w++) wave[w] = hold(load(&table_.waves[i * kRun + j + w * lanes]));
        for (int r = 0; r < kWidth; r++) {
          const vf by = splat(turned[i * kWidth + r]);
          for (int w = 0; w < kBunch; w++) acc[w][r] += by * wave[w];
        }
      }
      for (int w = 0; w < kBunch; w++) Rows<kWidth>::interleave(acc[w], found + (j + w * lanes) * kWidth);
    }
  }

  const CenterTable& table_;
  const AttendCall& call_;
  const int32_t* positions_;
  std::vector<float> pairs_;    // a and b of every pair, [pairs][2][kWidth]
  float still_[kWidth] = {};    // of channels that do not rotate
};

}  // namespace kvfold
