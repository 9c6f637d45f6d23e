// What the ways of attending share: reading codes, softmax weights, and joining parts of the keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "lanes_avx512.h"
#include "pool.h"

namespace kvfold {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Rows that are read next, asked for in `times` shares while there is other work, so that far memory is not waited for.
class Ahead {
 public:
  Ahead(const uint8_t* rows, int64_t stride, int64_t count, int64_t times)
      : at_(rows), end_(rows + std::max<int64_t>(0, count) * stride), step_(stride <= kFar ? kLine : stride) {
    share_ = ((end_ - at_) / std::max<int64_t>(1, times) / step_ + 1) * step_;
  }

  void ask() {
    for (const uint8_t* to = end_ - at_ < share_ ? end_ : at_ + share_; at_ < to; at_ += step_) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64, kFar = 256;  // rows further apart are no piece of memory to be read as a whole
  const uint8_t *at_, *end_;
  int64_t step_, share_;
};

// Codes of tokens first..first+count-1 as 16-bit numbers, `[count][codes]`.
inline void unpack(const Side& side, const uint8_t* row, int64_t count, uint16_t* to) {
  const int64_t codes = side.books->codes(), bytes = (codes * side.bits + 7) / 8;
  const uint32_t keep = (1u << side.bits) - 1;
  const bool checked = side.books->size < int64_t{1} << side.bits;
  for (int64_t t = 0; t < count; t++, row += side.token_stride, to += codes) {
    if (side.bits == 8) {
      for (int64_t l = 0; l < codes; l++) to[l] = row[l];
    } else {
      uint64_t window = 0;
      int available = 0;
      int64_t at = 0;
      for (int64_t l = 0; l < codes; l++) {
        while (available < side.bits && at < bytes) {
          window |= static_cast<uint64_t>(row[at++]) << available;
          available += 8;
        }
        to[l] = static_cast<uint16_t>(window & keep);
        window >>= side.bits;
        available -= side.bits;
      }
    }
    if (checked)
      for (int64_t l = 0; l < codes; l++)
        if (to[l] >= side.books->size) throw CodeOutOfRange();
  }
}

// Exact vectors of tokens first..first+count-1, `[count][D]`.
inline void read_dense(const Side& side, int64_t b, int64_t g, int64_t first, int64_t count, float* to) {
  int64_t at = b * side.batch_stride + g * side.head_stride + first * side.token_stride;
  for (int64_t t = 0; t < count; t++, at += side.token_stride, to += side.dim) {
    if (side.half) {
      const uint16_t* from = static_cast<const uint16_t*>(side.dense) + at;
      for (int64_t i = 0; i < side.dim; i++) to[i] = from_bfloat16(from[i]);
    } else {
      std::copy_n(static_cast<const float*>(side.dense) + at, side.dim, to);
    }
  }
}

inline const uint8_t* code_row(const Side& side, int64_t b, int64_t g, int64_t t) {
  return side.packed + b * side.batch_stride + g * side.head_stride + t * side.token_stride;
}

// `count` scales, `stride` apart: float16 numbers, or the upper bits of such.
template <class Number>
inline void read_scales(const Number* from, int64_t stride, int64_t count, float* to) {
  constexpr int kUp = sizeof(Number) == 1 ? 7 : 0;
  typedef Number Numbers __attribute__((vector_size(lanes * sizeof(Number))));
  typedef uint16_t Halves __attribute__((vector_size(lanes * 2)));
  [[maybe_unused]] const int64_t apart = stride * static_cast<int64_t>(sizeof(Number));
  for (int64_t t = 0; t < count; t += lanes, from += lanes * stride) {
    Number some[lanes] = {};
    if (count - t < lanes)
      for (int64_t i = 0; i < count - t; i++) some[i] = from[i * stride];
    else if (stride == 1)
      std::memcpy(some, from, sizeof some);
#if defined(__AVX512F__)
    else if (apart >= 4 && apart <= kGathered && t + lanes < count)  // reads to within the next one: there is one
      gather_16(from, apart, some);
#endif
    else
      for (int i = 0; i < lanes; i++) some[i] = from[i * stride];
    Numbers numbers;
    std::memcpy(&numbers, some, sizeof numbers);
    uint16_t halves[lanes];
    const Halves wide = __builtin_convertvector(numbers, Halves) << kUp;
    std::memcpy(halves, &wide, sizeof halves);
    store(to + t, load_halves(halves));
  }
}

// Scales of `count` tokens; `to` has room for whole lane vectors.
inline void read_scales(const Side& side, int64_t b, int64_t g, int64_t first, int64_t count, float* to) {
  const int64_t at = b * side.scale_batch_stride + g * side.scale_head_stride + first * side.scale_token_stride;
  if (side.short_scale)
    read_scales(static_cast<const uint8_t*>(side.scale) + at, side.scale_token_stride, count, to);
  else
    read_scales(static_cast<const uint16_t*>(side.scale) + at, side.scale_token_stride, count, to);
}

// The largest of `tokens` scales, without their signs.
inline float largest_scale(const Side& side, int64_t b, int64_t g, int64_t tokens) {
  const int64_t at = b * side.scale_batch_stride + g * side.scale_head_stride, stride = side.scale_token_stride;
  const auto largest = [&](const auto* from, int up) {
    uint16_t most = 0;  // the bits of positive halves are in their order
    const auto all = [&](int64_t apart) {
      for (int64_t t = 0; t < tokens; t++) most = std::max<uint16_t>(most, from[t * apart] << up & 0x7fff);
    };
    if (stride == 1)
      all(1);
    else
      all(stride);
    return half_to_float(most);
  };
  return side.short_scale ? largest(static_cast<const uint8_t*>(side.scale) + at, 7)
                          : largest(static_cast<const uint16_t*>(side.scale) + at, 0);
}

// A table of the call's that is the same for many calls; those of a few models are kept: a model's layers mostly share one.
template <class Table>
std::shared_ptr<const Table> kept(const AttendCall& call) {
  static std::mutex guard;
  static std::vector<std::shared_ptr<const Table>> tables;
  std::lock_guard<std::mutex> lock(guard);
  for (const auto& known : tables)
    if (known->fits(call)) return known;
  if (tables.size() >= 8) tables.erase(tables.begin());
  tables.push_back(std::make_shared<const Table>(call));
  return tables.back();
}

// softcap * tanh(score / softcap)
inline vf capped(vf score, float softcap) {
  vf twice = score * (2.0f / softcap);
  twice = larger(twice, splat(-40.0f));
  twice = twice < 40.0f ? twice : splat(40.0f);
  return softcap * (1.0f - 2.0f / (exp_of(twice) + 1.0f));
}

// Attention over one part of the keys for one (batch row, KV head): sums relative to `top`, not yet divided.
struct Part {
  float* sums;   // [rows][value dim]
  float* top;    // [rows]
  float* total;  // [rows]
};

// out and lse of `rows` rows from their parts; false if a row's keys were skipped for more than
// `skip` of its output's norm allows. `skipped[part][row]` bounds the norm of what was left out of `sums`.
inline bool join(const std::vector<Part>& parts, const std::vector<const float*>& skipped, float skip, int64_t rows, int64_t dim,
                 float* out, float* lse) {
  for (int64_t r = 0; r < rows; r++) {
    float top = kMinusInfinity;
    for (const Part& part : parts) top = std::max(top, part.top[r]);
    float* to = out + r * dim;
    std::fill_n(to, dim, 0.0f);
    if (top == kMinusInfinity) {
      lse[r] = top;
      continue;
    }
    double total = 0, lost = 0;
    for (size_t i = 0; i < parts.size(); i++) {
      if (parts[i].top[r] == kMinusInfinity) continue;
      const float weight = std::exp(parts[i].top[r] - top);
      total += static_cast<double>(weight) * parts[i].total[r];
      if (!skipped.empty()) lost += static_cast<double>(weight) * skipped[i][r];
      const float* from = parts[i].sums + r * dim;
      for (int64_t d = 0; d < dim; d++) to[d] += weight * from[d];
    }
    if (lost > 0) {
      double square = 0;
      for (int64_t d = 0; d < dim; d++) square += static_cast<double>(to[d]) * to[d];
      // What is there has norm n, what should be there at least n - lost.
      if (lost > skip * (std::sqrt(square) - lost)) return false;
    }
    const float share = static_cast<float>(1 / total);
    for (int64_t d = 0; d < dim; d++) to[d] *= share;
    lse[r] = top + static_cast<float>(std::log(total));
  }
  return true;
}

}  // namespace kvfold
