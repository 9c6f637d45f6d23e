// The tiles of attend_tiles.h with both products on the CPU's matrix unit (AMX, bfloat16), for many queries.
//
// bfloat16 queries are of a bfloat16 model, whose own attention multiplies in bfloat16 too: here the decoded keys and values and
// the weights are rounded likewise. For others every number is split into two bfloat16 ones and three of the four products are
// formed, which leaves 2^-16 of the lengths' product. Sums, maxima and exponentials are float32 in either case.
#pragma once

#include "amx.h"
#include "attend_tiles.h"

#if defined(__AMX_BF16__)

namespace kvfold {

constexpr int64_t kAmxRows = 512;  // query rows of a piece of work
constexpr float kAmxRescale = 8;   // a maximum that rises by less is not followed: weights up to e^8

class AmxAttention {
 public:
  static bool serves(const AttendCall& call) {
    return !call.center && call.queries > 1 && call.shared * call.queries >= 32 && call.shared <= kAmxRows && call.key.dim % 32 == 0 &&
           call.value.dim % 16 == 0;
  }

  static void run(const AttendCall& call) {
    const bool rotated = call.positions != nullptr;
    const Order key_order(call.key, rotated ? &call : nullptr), value_order(call.value, nullptr);
    const int64_t block = std::max<int64_t>(1, std::min(call.queries, kAmxRows / call.shared));
    const int64_t blocks = (call.queries + block - 1) / block;
    parallel_for(call.threads, call.batch * call.kv_heads * blocks, [&](int64_t item) {
      const int64_t pair = item / blocks, first = item % blocks * block;
      AmxAttention(call, key_order, value_order, pair, first, std::min(block, call.queries - first)).attend();
    });
  }

 private:
  AmxAttention(const AttendCall& call, const Order& key_order, const Order& value_order, int64_t pair, int64_t first,
               int64_t count)
      : call_(call),
        key_order_(key_order),
        value_order_(value_order),
        pair_(pair),
        first_query_(first),
        queries_(count),
        rows_(call.shared * count),
        padded_((rows_ + 15) / 16 * 16),
        terms_(call.half ? 1 : 2),
        key_parts_(call.key.dim / 32),
        value_parts_(call.value.dim / 16),
        decoded_(kTile * std::max(call.key.dim, call.value.dim)),
        query_(terms_ * padded_ * call.key.dim, 0),
        key_tiles_(terms_ * key_parts_ * 4 * 512),
        value_tiles_(terms_ * value_parts_ * 2 * 512),
        sums_(padded_ * call.value.dim, 0.0f),
        top_(padded_, kMinusInfinity),
        total_(padded_, 0.0f) {}

  void attend() {
    const AmxTiles tiles;
    const int64_t b = pair_ / call_.kv_heads, dim = call_.key.dim;
    read_queries();
    for (int64_t first = 0; first < call_.tokens; first += kTile) {
      const int64_t count = std::min(kTile, call_.tokens - first);
      if (call_.mask && !visible(call_, b, first_query_, queries_, first, count)) continue;
      alignas(64) float key_scales[kTile] = {}, value_scales[kTile] = {};
      read(call_.key, key_order_, first, count, key_scales);
      if (call_.positions) rotate_tile(call_, b, first, count, dim, decoded_.data());
      make_key_tiles();
      read(call_.value, value_order_, first, count, value_scales);
      make_value_tiles();
      for (int64_t row = 0; row < padded_; row += 16) {
        alignas(64) float scores[16 * kTile];
        alignas(64) uint16_t weights[2 * 16 * kTile];
        score(row, scores);
        if (weigh(row, first, count, key_scales, value_scales, scores, weights)) mix(row, weights);
      }
    }
    write();
  }

  // Queries [terms][padded][D] in the keys' order, times the softmax scale.
  void read_queries() {
    const int64_t dim = call_.key.dim;
    std::vector<float> ordered(dim);
    for (int64_t r = 0; r < rows_; r++) {
      const float* from = call_.query + place(r) * dim;
      for (int64_t i = 0; i < dim; i++) ordered[i] = from[key_order_.channels[i]] * call_.softmax_scale;
      for (int64_t i = 0; i < dim; i += 16) {
        __m512 x = _mm512_loadu_ps(&ordered[i]);
        for (int64_t term = 0; term < terms_; term++) {
          const __m512i near = nearest_bfloat16(x);
          const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(&query_[(term * padded_ + r) * dim + i]), halves);
          x = _mm512_sub_ps(x, _mm512_castsi512_ps(near));
        }
      }
    }
  }

  // Row of `query`, `out` and `lse` of the call.
  int64_t place(int64_t row) const {
    return (pair_ * call_.shared + row / queries_) * call_.queries + first_query_ + row % queries_;
  }

  // Vectors of one side into `decoded_`, zeros behind the last.
  void read(const Side& side, const Order& order, int64_t first, int64_t count, float* scales) {
    const int64_t b = pair_ / call_.kv_heads, g = pair_ % call_.kv_heads, dim = side.dim;
    if (side.books) {
      decode_tile(side, order, b, g, first, count, codes_, decoded_.data());
      read_scales(side, b, g, first, count, scales);
    } else {
      const float* from = side.dense + b * side.batch_stride + g * side.head_stride;
      for (int64_t t = 0; t < count; t++) std::copy_n(from + (first + t) * side.token_stride, dim, &decoded_[t * dim]);
      std::fill_n(scales, count, 1.0f);
    }
    std::fill_n(&decoded_[count * dim], (kTile - count) * dim, 0.0f);
  }

  // Keys as right factors: [terms][parts of 32 channels][4 bunches of 16 keys][16 pairs of channels][16 keys][2].
  void make_key_tiles() {
    const int64_t dim = call_.key.dim;
    for (int64_t t = 0; t < kTile; t++)
      for (int64_t i = 0; i < dim; i += 16) {
        __m512 x = _mm512_loadu_ps(&decoded_[t * dim + i]);
        for (int64_t term = 0; term < terms_; term++) {
          const __m512i near = nearest_bfloat16(x);
          alignas(32) uint32_t pairs[8];
          _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
          uint16_t* tile = &key_tiles_[((term * key_parts_ + i / 32) * 4 + t / 16) * 512];
          for (int64_t k = 0; k < 8; k++) std::memcpy(tile + (i % 32 / 2 + k) * 32 + t % 16 * 2, &pairs[k], 4);
          x = _mm512_sub_ps(x, _mm512_castsi512_ps(near));
        }
      }
  }

  // Values as right factors: [terms][parts of 16 channels][2 halves of the keys][16 pairs of keys][16 channels][2].
  void make_value_tiles() {
    const int64_t dim = call_.value.dim;
    for (int64_t t = 0; t < kTile; t += 2)
      for (int64_t i = 0; i < dim; i += 16) {
        __m512 x = _mm512_loadu_ps(&decoded_[t * dim + i]), y = _mm512_loadu_ps(&decoded_[(t + 1) * dim + i]);
        for (int64_t term = 0; term < terms_; term++) {
          const __m512i even = nearest_bfloat16(x), odd = nearest_bfloat16(y);
          uint16_t* tile = &value_tiles_[((term * value_parts_ + i / 16) * 2 + t / 32) * 512];
          _mm512_storeu_si512(tile + t % 32 / 2 * 32, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
          x = _mm512_sub_ps(x, _mm512_castsi512_ps(even));
          y = _mm512_sub_ps(y, _mm512_castsi512_ps(odd));
        }
      }
  }

  // scores [16][64] of rows row..row+15.
  void score(int64_t row, float* scores) {
    const int64_t dim = call_.key.dim, stride = dim * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t part = 0; part < key_parts_; part++)
      for (int64_t left = 0; left < terms_; left++) {
        _tile_loadd(4, &query_[(left * padded_ + row) * dim + part * 32], stride);
        for (int64_t right = 0; left + right < terms_; right++) {
          const uint16_t* tile = &key_tiles_[(right * key_parts_ + part) * 4 * 512];
          _tile_loadd(5, tile, 64);
          _tile_dpbf16ps(0, 4, 5);
          _tile_loadd(6, tile + 512, 64);
          _tile_dpbf16ps(1, 4, 6);
          _tile_loadd(5, tile + 1024, 64);
          _tile_dpbf16ps(2, 4, 5);
          _tile_loadd(6, tile + 1536, 64);
          _tile_dpbf16ps(3, 4, 6);
        }
      }
    _tile_stored(0, scores, kTile * 4);
    _tile_stored(1, scores + 16, kTile * 4);
    _tile_stored(2, scores + 32, kTile * 4);
    _tile_stored(3, scores + 48, kTile * 4);
  }

  // Weights [terms][16][64] of the scores, times the values' scales; maxima and totals brought up to date. False if all are 0.
  bool weigh(int64_t row, int64_t first, int64_t count, const float* key_scales, const float* value_scales, const float* scores,
             uint16_t* weights) {
    const uint64_t there = count == kTile ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    bool any = false;
    for (int64_t r = 0; r < 16; r++) {
      const uint64_t seen = row + r < rows_ ? there & mask_of(row + r, first, count) : 0;
      __m512 x[4];
      __m512 best = _mm512_set1_ps(kMinusInfinity);
      for (int k = 0; k < 4; k++) {
        x[k] = _mm512_mul_ps(_mm512_load_ps(scores + r * kTile + 16 * k), _mm512_load_ps(key_scales + 16 * k));
        if (call_.softcap != 0) x[k] = (__m512)capped((vf)x[k], call_.softcap);
        best = _mm512_mask_max_ps(best, static_cast<__mmask16>(seen >> (16 * k)), best, x[k]);
      }
      float& top = top_[row + r];
      const float highest = seen ? _mm512_reduce_max_ps(best) : kMinusInfinity;
      if (highest > top + kAmxRescale || (top == kMinusInfinity && seen)) {
        if (top != kMinusInfinity) {
          const float keep = std::exp(top - highest);
          total_[row + r] *= keep;
          float* sums = &sums_[(row + r) * call_.value.dim];
          for (int64_t i = 0; i < call_.value.dim; i++) sums[i] *= keep;
        }
        top = highest;
      }
      __m512 total = _mm512_setzero_ps();
      const __m512 reference = _mm512_set1_ps(seen ? top : 0.0f);
      any = any || seen;
      for (int k = 0; k < 4; k++) {
        const __mmask16 some = static_cast<__mmask16>(seen >> (16 * k));
        const __m512 weight = _mm512_maskz_mov_ps(some, (__m512)exp_of((vf)_mm512_sub_ps(x[k], reference)));
        total = _mm512_add_ps(total, weight);
        __m512 scaled = _mm512_maskz_mul_ps(some, weight, _mm512_load_ps(value_scales + 16 * k));
        for (int64_t term = 0; term < terms_; term++) {
          const __m512i near = nearest_bfloat16(scaled);
          _mm256_store_si256(reinterpret_cast<__m256i*>(weights + (term * 16 + r) * kTile + 16 * k),
                             _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
          scaled = _mm512_sub_ps(scaled, _mm512_castsi512_ps(near));
        }
      }
      total_[row + r] += _mm512_reduce_add_ps(total);
    }
    return any;
  }

  // Which keys of the tile a row sees, a bit each.
  uint64_t mask_of(int64_t row, int64_t first, int64_t count) const {
    if (!call_.mask) return ~uint64_t{0};
    const uint8_t* mask = call_.mask + pair_ / call_.kv_heads * call_.mask_batch_stride +
                          (first_query_ + row % queries_) * call_.mask_query_stride + first * call_.mask_token_stride;
    if (call_.mask_token_stride == 1 && count == kTile) {
      const __m512i bytes = _mm512_loadu_si512(mask);
      return _mm512_test_epi8_mask(bytes, bytes);
    }
    uint64_t seen = 0;
    for (int64_t t = 0; t < count; t++) seen |= static_cast<uint64_t>(mask[t * call_.mask_token_stride] != 0) << t;
    return seen;
  }

  // sums [16 rows][value dim] += weights . values
  void mix(int64_t row, const uint16_t* weights) {
    const int64_t dim = call_.value.dim;
    _tile_loadd(4, weights, kTile * 2);
    _tile_loadd(5, weights + 32, kTile * 2);
    if (terms_ == 2) {
      _tile_loadd(6, weights + 16 * kTile, kTile * 2);
      _tile_loadd(7, weights + 16 * kTile + 32, kTile * 2);
    }
    for (int64_t part = 0; part < value_parts_; part++) {
      float* sums = &sums_[row * dim + part * 16];
      const uint16_t* tile = &value_tiles_[part * 2 * 512];
      _tile_loadd(0, sums, dim * 4);
      _tile_loadd(1, tile, 64);
      _tile_loadd(2, tile + 512, 64);
      _tile_dpbf16ps(0, 4, 1);
      _tile_dpbf16ps(0, 5, 2);
      if (terms_ == 2) {
        _tile_dpbf16ps(0, 6, 1);
        _tile_dpbf16ps(0, 7, 2);
        tile += value_parts_ * 2 * 512;
        _tile_loadd(1, tile, 64);
        _tile_loadd(2, tile + 512, 64);
        _tile_dpbf16ps(0, 4, 1);
        _tile_dpbf16ps(0, 5, 2);
      }
      _tile_stored(0, sums, dim * 4);
    }
  }

  void write() const {
    const int64_t dim = call_.value.dim;
    for (int64_t r = 0; r < rows_; r++) {
      float* out = call_.out + place(r) * dim;
      const bool seen = top_[r] != kMinusInfinity;
      const float share = seen ? 1 / total_[r] : 0.0f;
      for (int64_t i = 0; i < dim; i++) out[value_order_.channels[i]] = sums_[r * dim + i] * share;
      call_.lse[place(r)] = seen ? top_[r] + std::log(total_[r]) : kMinusInfinity;
    }
  }

  const AttendCall& call_;
  const Order &key_order_, &value_order_;
  int64_t pair_, first_query_, queries_, rows_, padded_, terms_, key_parts_, value_parts_;
  Aligned<float> decoded_;
  Aligned<uint16_t> query_, key_tiles_, value_tiles_;
  Aligned<float> sums_;
  std::vector<float> top_, total_;
  std::vector<uint16_t> codes_;
};

}  // namespace kvfold

#endif
