// The tiles of attend_tiles.h with both products on the CPU's matrix unit (AMX, bfloat16), for many queries.
//
// bfloat16 queries are of a bfloat16 model, whose own attention multiplies in bfloat16 too: here the decoded keys and values and
// the weights are rounded likewise. For others every number is split into two bfloat16 ones and three of the four products are
// formed, which leaves 2^-16 of the lengths' product. Sums, maxima and exponentials are float32 in either case.
#pragma once

#include <optional>

#include "attend_factors.h"

#if defined(__AMX_BF16__)

namespace kvfold {

// Keys and values are decoded once for a round of queries, some tiles at a time, so memory depends on neither number.
constexpr int64_t kAmxQueries = 1024;  // queries of a round
constexpr int64_t kAmxTiles = 16;      // tiles of 64 keys that are decoded together
constexpr int64_t kAmxRows = 256;      // query rows of a piece of work
constexpr float kAmxRescale = 8;       // a maximum that rises by less is not followed: weights up to e^8

// exp(x), relative error below 3e-6: 2^n * p(f), n the integer below x / ln 2 and f the rest.
inline __m512 exp_near(__m512 x) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF);
  __m512 p = _mm512_set1_ps(1.353412e-2f);  // least relative error
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201143e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4144287e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9300378e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
  return _mm512_scalef_ps(p, y);
}

// Some query rows of a KV head.
class AmxAttention {
 public:
  AmxAttention(const AttendCall& call, const AmxFactors& factors, int64_t pair, int64_t first, int64_t count)
      : call_(call),
        factors_(factors),
        pair_(pair),
        first_query_(first),
        queries_(count),
        rows_(call.shared * count),
        padded_((rows_ + 15) / 16 * 16),
        query_(factors.terms * padded_ * call.key.dim, 0),
        sums_(padded_ * call.value.dim, 0.0f),
        total_(padded_ * 16, 0.0f),
        top_(padded_, kMinusInfinity) {
    read_queries();
  }

  // Keys and values of a tile of the factors, of which each query sees those of `seen`, a bit each.
  template <int kTerms>
  void attend(int64_t tile, const uint64_t* seen) {
    const float* scales = factors_.scales(pair_, tile);
    for (int64_t row = 0; row < padded_; row += 16) {
      alignas(64) float scores[16 * kTile];
      alignas(64) uint16_t weights[2 * 16 * kTile];
      uint64_t of_row[16], any = 0;
      for (int64_t r = 0; r < 16; r++) any |= of_row[r] = row + r < rows_ ? seen[(row + r) % queries_] : 0;
      if (!any) continue;
      score<kTerms>(row, factors_.keys(pair_, tile), scores);
      weigh<kTerms>(row, of_row, scales, scales + kTile, scores, weights);
      mix<kTerms>(row, weights, factors_.values(pair_, tile));
    }
  }

  void write() const {
    const int64_t dim = call_.value.dim;
    for (int64_t r = 0; r < rows_; r++) {
      float* out = call_.out + place(r) * dim;
      const bool seen = top_[r] != kMinusInfinity;
      const float total = _mm512_reduce_add_ps(_mm512_load_ps(&total_[r * 16])), share = seen ? 1 / total : 0.0f;
      for (int64_t i = 0; i < dim; i++) out[factors_.value_order.channels[i]] = sums_[r * dim + i] * share;
      call_.lse[place(r)] = seen ? top_[r] + std::log(total) : kMinusInfinity;
    }
  }

 private:
  // Queries [terms][padded][D] in the keys' order, times the softmax scale.
  void read_queries() {
    const int64_t dim = call_.key.dim;
    std::vector<float> ordered(dim);
    for (int64_t r = 0; r < rows_; r++) {
      const float* from = call_.query + place(r) * dim;
      for (int64_t i = 0; i < dim; i++) ordered[i] = from[factors_.key_order.channels[i]] * call_.softmax_scale;
      for (int64_t i = 0; i < dim; i += 16) {
        __m512 x = _mm512_loadu_ps(&ordered[i]);
        for (int64_t term = 0; term < factors_.terms; term++) {
          const __m256i near = to_bfloat16(x);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(&query_[(term * padded_ + r) * dim + i]), near);
          x = _mm512_sub_ps(x, from_bfloat16(near));
        }
      }
    }
  }

  // Row of `query`, `out` and `lse` of the call.
  int64_t place(int64_t row) const {
    return (pair_ * call_.shared + row / queries_) * call_.queries + first_query_ + row % queries_;
  }

  // scores [16][64] of rows row..row+15.
  template <int kTerms>
  void score(int64_t row, const uint16_t* keys, float* scores) const {
    const int64_t dim = call_.key.dim, stride = dim * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t part = 0; part < factors_.key_parts; part++)
      for (int64_t left = 0; left < kTerms; left++) {
        _tile_loadd(4, &query_[(left * padded_ + row) * dim + part * 32], stride);
        for (int64_t right = 0; left + right < kTerms; right++) {
          const uint16_t* tile = keys + (right * factors_.key_parts + part) * 4 * 512;
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

  // Weights [terms][16][64] of the scores, times the values' scales; maxima and totals brought up to date.
  template <int kTerms>
  void weigh(int64_t row, const uint64_t* seen, const float* key_scales, const float* value_scales, const float* scores, uint16_t* weights) {
    for (int64_t r = 0; r < 16; r++) {
      __m512 x[4], best = _mm512_set1_ps(kMinusInfinity);
      for (int k = 0; k < 4; k++) {
        x[k] = _mm512_mul_ps(_mm512_load_ps(scores + r * kTile + 16 * k), _mm512_load_ps(key_scales + 16 * k));
        if (call_.softcap != 0) x[k] = (__m512)capped((vf)x[k], call_.softcap);
        best = _mm512_mask_max_ps(best, static_cast<__mmask16>(seen[r] >> (16 * k)), best, x[k]);
      }
      float& top = top_[row + r];
      float* const total = &total_[(row + r) * 16];
      // A first maximum is above -infinity + 8 too. Seldom else, so the largest of all is looked for only then.
      if (_mm512_cmp_ps_mask(best, _mm512_set1_ps(top + kAmxRescale), _CMP_GT_OQ)) {
        const float highest = _mm512_reduce_max_ps(best), keep = top == kMinusInfinity ? 0.0f : std::exp(top - highest);
        float* sums = &sums_[(row + r) * call_.value.dim];
        for (int64_t i = 0; i < 16; i++) total[i] *= keep;
        for (int64_t i = 0; i < call_.value.dim; i++) sums[i] *= keep;
        top = highest;
      }
      __m512 more = _mm512_load_ps(total);
      const __m512 reference = _mm512_set1_ps(top);
      for (int k = 0; k < 4; k++) {
        const __mmask16 some = static_cast<__mmask16>(seen[r] >> (16 * k));
        const __m512 weight = _mm512_maskz_mov_ps(some, exp_near(_mm512_sub_ps(x[k], reference)));
        more = _mm512_add_ps(more, weight);
        __m512 scaled = _mm512_maskz_mul_ps(some, weight, _mm512_load_ps(value_scales + 16 * k));
        for (int64_t term = 0; term < kTerms; term++) {
          const __m256i near = to_bfloat16(scaled);
          _mm256_store_si256(reinterpret_cast<__m256i*>(weights + (term * 16 + r) * kTile + 16 * k), near);
          if (term + 1 < kTerms) scaled = _mm512_sub_ps(scaled, from_bfloat16(near));
        }
      }
      _mm512_store_ps(total, more);
    }
  }

  // sums [16 rows][value dim] += weights . values
  template <int kTerms>
  void mix(int64_t row, const uint16_t* weights, const uint16_t* values) {
    const int64_t dim = call_.value.dim;
    _tile_loadd(4, weights, kTile * 2);
    _tile_loadd(5, weights + 32, kTile * 2);
    if (kTerms == 2) {
      _tile_loadd(6, weights + 16 * kTile, kTile * 2);
      _tile_loadd(7, weights + 16 * kTile + 32, kTile * 2);
    }
    for (int64_t part = 0; part < factors_.value_parts; part++) {
      float* sums = &sums_[row * dim + part * 16];
      const uint16_t* tile = values + part * 2 * 512;
      _tile_loadd(0, sums, dim * 4);
      _tile_loadd(1, tile, 64);
      _tile_loadd(2, tile + 512, 64);
      _tile_dpbf16ps(0, 4, 1);
      _tile_dpbf16ps(0, 5, 2);
      if (kTerms == 2) {
        _tile_dpbf16ps(0, 6, 1);
        _tile_dpbf16ps(0, 7, 2);
        tile += factors_.value_parts * 2 * 512;
        _tile_loadd(1, tile, 64);
        _tile_loadd(2, tile + 512, 64);
        _tile_dpbf16ps(0, 4, 1);
        _tile_dpbf16ps(0, 5, 2);
      }
      _tile_stored(0, sums, dim * 4);
    }
  }

  const AttendCall& call_;
  const AmxFactors& factors_;
  int64_t pair_, first_query_, queries_, rows_, padded_;
  Aligned<uint16_t> query_;
  Aligned<float> sums_, total_;  // [padded][value dim], [padded][16]
  std::vector<float> top_;
};

// Queries first..first+count-1 of all heads.
class AmxRound {
 public:
  AmxRound(const AttendCall& call, AmxFactors& factors, int64_t first, int64_t count)
      : call_(call),
        factors_(factors),
        first_(first),
        count_(count),
        block_(std::max<int64_t>(1, kAmxRows / call.shared)),
        blocks_((count + block_ - 1) / block_),
        pieces_(call.batch * call.kv_heads * blocks_),
        seen_(call.batch * kAmxTiles * count) {
    parallel_for(call.threads, pieces_.size(), [&](int64_t item) {
      const int64_t from = item % blocks_ * block_;
      pieces_[item].emplace(call, factors, item / blocks_, first + from, std::min(block_, count - from));
    });
  }

  // Go through `tiles` tiles of keys from the one `first` on.
  void attend(int64_t first, int64_t tiles) {
    if (!any_seen(call_, first_, count_, first * kTile, (first + tiles) * kTile)) return;
    const int64_t pairs = call_.batch * call_.kv_heads;
    parallel_for(call_.threads, call_.batch * blocks_, [&](int64_t item) { look(item / blocks_, item % blocks_ * block_, first, tiles); });
    parallel_for(call_.threads, pairs * tiles, [&](int64_t item) {
      const int64_t pair = item / tiles, i = item % tiles;
      if (any(seen(pair, i), count_)) factors_.make(pair, i, (first + i) * kTile, tokens_of(first + i));
    });
    parallel_for(call_.threads, pairs * blocks_, [&](int64_t item) {
      const int64_t pair = item / blocks_, from = item % blocks_ * block_, count = std::min(block_, count_ - from);
      AmxAttention& piece = *pieces_[item];
      const AmxTiles unit;
      for (int64_t i = 0; i < tiles; i++) {
        const uint64_t* own = seen(pair, i) + from;
        if (any(own, count)) factors_.terms == 1 ? piece.attend<1>(i, own) : piece.attend<2>(i, own);
      }
    });
  }

  void write() {
    parallel_for(call_.threads, pieces_.size(), [&](int64_t item) { pieces_[item]->write(); });
  }

 private:
  // Which keys the queries of a block see. A query's mask lies side by side, so all tiles are looked at for one after the other.
  void look(int64_t b, int64_t block, int64_t first, int64_t tiles) {
    for (int64_t q = block; q < std::min(block + block_, count_); q++)
      for (int64_t i = 0; i < tiles; i++)
        seen_[(b * kAmxTiles + i) * count_ + q] = keys_seen(call_, b, first_ + q, (first + i) * kTile, tokens_of(first + i));
  }

  const uint64_t* seen(int64_t pair, int64_t tile) const { return &seen_[(pair / call_.kv_heads * kAmxTiles + tile) * count_]; }
  static bool any(const uint64_t* seen, int64_t count) {
    return std::any_of(seen, seen + count, [](uint64_t keys) { return keys != 0; });
  }
  int64_t tokens_of(int64_t tile) const { return std::min(kTile, call_.tokens - tile * kTile); }

  const AttendCall& call_;
  AmxFactors& factors_;
  const int64_t first_, count_, block_, blocks_;  // block_: queries of a piece
  std::vector<std::optional<AmxAttention>> pieces_;
  std::vector<uint64_t> seen_;  // [batch][kAmxTiles][count]: which keys of a tile a query sees, a bit each
};

inline bool amx_serves(const AttendCall& call) {
  return !call.center && call.queries > 1 && call.shared * call.queries >= 32 && call.shared <= kAmxRows && call.tokens > 0 &&
         call.key.dim % 32 == 0 && call.value.dim % 16 == 0;
}

inline void attend_amx(const AttendCall& call) {
  const int64_t all = (call.tokens + kTile - 1) / kTile;
  AmxFactors factors(call, std::min(kAmxTiles, all));
  for (int64_t first = 0; first < call.queries; first += kAmxQueries) {
    AmxRound round(call, factors, first, std::min(kAmxQueries, call.queries - first));
    for (int64_t tile = 0; tile < all; tile += kAmxTiles) round.attend(tile, std::min(kAmxTiles, all - tile));
    round.write();
  }
}

}  // namespace kvfold

#endif
