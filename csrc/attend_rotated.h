// Scores of keys that were coded before RoPE, for a few queries: codewords are added as 16-bit integers, rotated and multiplied
// in registers (AVX-512 with VNNI). Other CPUs decode to float32 (attend_tiles.h).
//
// A tile of 64 keys lies within 64 positions of its first, p0, so with R the rotation
//     q . R(p0 + i) k = (R(p0)^T q) . R(i) k,    i = 0..63
// takes the queries to p0 once a tile, and one table of R(i) serves all tiles. Both members of a pair must lie in one group,
// half a group apart, which strided groups of 32 channels do.
//
// Error: integers have a step of 1/32,700 of the longest sum of codewords' pairs there can be; queries are rounded to 16 bits
// or as many as keep the sum of products, at most |q| |k|, within 32.
#pragma once

#include "attend_parts.h"

namespace kvfold {

constexpr int64_t kRotationTile = 64;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

}  // namespace kvfold

#include <immintrin.h>

namespace kvfold {

// R(0)..R(63) for the pairs of every group, in units of 2^-15: of all groups minus the sines and the sines, 32 numbers a group, then
// cosines, 16 numbers a group.
struct RotationTable {
  std::vector<float> inv_freq;
  std::vector<int32_t> channels;
  Aligned<int16_t> turns;           // [64][P * 48]
  std::vector<float> sine, cosine;  // [P][16] of 64 positions

  RotationTable(const AttendCall& call)
      : inv_freq(call.inv_freq, call.inv_freq + call.rotary), channels(call.key.books->channels) {
    const int64_t groups = call.key.books->groups;
    turns.resize(kRotationTile * groups * 48);
    const auto fixed = [](float x) { return static_cast<int16_t>(std::lrint(std::clamp(x * 32768.0f, -32767.0f, 32767.0f))); };
    for (int64_t i = 0; i < kRotationTile; i++)
      for (int64_t p = 0; p < groups; p++)
        for (int64_t j = 0; j < 16; j++) {
          float s, c;
          sine_cosine(static_cast<float>(i) * inv_freq[channels[p * 32 + j]], &s, &c);
          int16_t* to = &turns[i * groups * 48 + p * 32];
          to[j] = fixed(-s);
          to[16 + j] = fixed(s);
          turns[i * groups * 48 + groups * 32 + p * 16 + j] = fixed(c);
        }
    for (int64_t p = 0; p < groups; p++)
      for (int64_t j = 0; j < 16; j++) {
        float s, c;
        sine_cosine(static_cast<float>(kRotationTile) * inv_freq[channels[p * 32 + j]], &s, &c);
        sine.push_back(s);
        cosine.push_back(c);
      }
  }

  bool fits(const AttendCall& call) const {
    return channels == call.key.books->channels && static_cast<int64_t>(inv_freq.size()) == call.rotary &&
           std::equal(inv_freq.begin(), inv_freq.end(), call.inv_freq);
  }
};

struct RotatedPlan {
  bool possible = false;
  std::shared_ptr<const RotationTable> table;

  explicit RotatedPlan(const AttendCall& call) {
    if (!call.positions || call.center || !call.key.books) return;
    const Books& books = *call.key.books;
    const int64_t n = call.rotary;
    if (books.dim != 32 || 2 * n != books.head_dim() || call.interleaved || call.softmax_scale == 0) return;
    for (int64_t p = 0; p < books.groups; p++)
      for (int64_t j = 0; j < 16; j++) {
        const int32_t* at = &books.channels[p * 32 + j];
        if (at[0] >= n || at[16] != at[0] + n) return;
      }
    for (int64_t b = 0; b < (call.positions_stride ? call.batch : 1); b++)
      for (int64_t t = 0; t < call.tokens; t += kRotationTile) {
        const int32_t* at = call.positions + b * call.positions_stride + t;
        const int64_t count = std::min(kRotationTile, call.tokens - t);
        int32_t low = at[0], high = at[0];
        for (int64_t i = 1; i < count; i++) {
          low = std::min(low, at[i]);
          high = std::max(high, at[i]);
        }
        if (high - low >= kRotationTile) return;
      }
    possible = true;
    table = kept<RotationTable>(call);
  }
};

class RotatedScores {
 public:
  RotatedScores(const RotatedPlan& plan, const AttendCall& call, int64_t b, int64_t g, int64_t first_row, int64_t rows)
      : plan_(plan), call_(call), b_(b), g_(g), rows_(rows) {
    if (!plan.possible) return;
    const Books& books = *call.key.books;
    const Books::Integers& whole = books.integers();
    const int64_t dim = call.key.dim, all = call.shared * call.queries, head = call.key.head + g;
    query_.resize(rows * dim);
    inverse_.assign(8, 0.0f);
    for (int64_t r = 0; r < rows; r++) {
      const float* from = call.query + ((b * call.kv_heads + g) * all + first_row + r) * dim;
      double square = 0;
      for (int64_t i = 0; i < dim; i++) {
        const float x = from[books.channels[i]] * call.softmax_scale * call.factor * whole.step[i % 32];
        query_[r * dim + i] = x;
        square += static_cast<double>(x) * x;
      }
      const double norm = std::sqrt(square);
      const double reach = whole.longest[head] + 2 * std::sqrt(static_cast<double>(dim));  // rotating rounds each entry twice
      const double scale = norm > 0 ? std::min(32766.0, 2.1e9 / reach) / norm : 0.0;
      for (int64_t i = 0; i < dim; i++) query_[r * dim + i] *= static_cast<float>(scale);
      inverse_[r] = scale > 0 ? static_cast<float>(1 / scale) : 0.0f;
    }
    turned_ = query_;
    sine_.resize(dim / 2);
    cosine_.resize(dim / 2);
    integers_.assign(8 * dim, 0);
    for (int64_t l = 0; l < books.codes(); l++)
      tables_.push_back(whole.values.data() + books.book[head * books.codes() + l] * books.size * 32);
    in_order_ = call.key.bits == 8 && books.size == 256;
    for (int64_t l = 0; l < books.codes(); l++)
      in_order_ = in_order_ && tables_[l] == tables_[l % books.groups] + l / books.groups * 256 * 32;
    if (!(call.key.bits == 8 && books.size == 256)) codes_.resize(kRotationTile * books.codes());
    near_.resize(codes_.empty() ? kRotationTile * books.codes() : 0);
    far_.resize(codes_.size());
  }

  // Scores (without the keys' scales) of keys first..first+count-1, `[count][kWidth]`, with room for a multiple of 4 keys.
  template <int kWidth>
  void scores(int64_t first, int64_t count, float* to, Ahead next) {
    const Books& books = *call_.key.books;
    const int64_t stride = call_.key.token_stride;
    Ahead own(code_row(call_.key, b_, g_, first), stride, count, (count + kRotationTile - 1) / kRotationTile);
    own.ask();
    for (int64_t t = 0; t < count; t += kRotationTile) {
      const int64_t size = std::min(kRotationTile, count - t);
      next.ask();
      own.ask();  // a tile ahead
      turn(first + t, size);
      const uint8_t* row = code_row(call_.key, b_, g_, first + t);
      if (in_order_ && books.groups == 4 && books.stages == 8) {
        tile<kWidth, 4, 8>(row, stride, size, to + t * kWidth);
      } else if (in_order_ && books.groups == 2 && books.stages == 8) {
        tile<kWidth, 2, 8>(row, stride, size, to + t * kWidth);
      } else if (codes_.empty()) {
        find(row, stride, size, near_.data());
        any_tile<kWidth>(near_.data(), books.codes(), size, to + t * kWidth);
      } else {
        unpack(call_.key, row, size, codes_.data());
        find(codes_.data(), books.codes(), size, far_.data());
        any_tile<kWidth>(far_.data(), books.codes(), size, to + t * kWidth);
      }
    }
  }

 private:
  // Where codewords lie in their tables, in bytes, of `count` tokens: found ahead of adding them up, which is then one
  // instruction less a codeword.
  template <class Code, class Place>
  void find(const Code* codes, int64_t stride, int64_t count, Place* to) const {
    const int64_t of = call_.key.books->codes();
    for (int64_t t = 0; t < count; t++, codes += stride, to += of) {
      int64_t l = 0;
      for (; l + kPlaced <= of; l += kPlaced) find_some(codes + l, to + l);
      for (; l < of; l++) to[l] = static_cast<Place>(static_cast<Place>(codes[l]) << 6);
    }
  }

  static constexpr int64_t kPlaced = 16;  // codes at a time: a head of two groups has as few

  static void find_some(const uint8_t* codes, uint16_t* to) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_slli_epi16(wide, 6));
  }

  static void find_some(const uint16_t* codes, uint32_t* to) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    _mm512_storeu_si512(to, _mm512_slli_epi32(wide, 6));
  }

  // Integers of group p of a token, scale 1.
  template <class Place>
  __m512i add_up(const Place* place, int64_t p, int64_t groups, int64_t stages) const {
    const auto codeword = [&](int64_t s) {
      return _mm512_loadu_si512(reinterpret_cast<const char*>(tables_[s * groups + p]) + place[s * groups + p]);
    };
    __m512i z = codeword(0);
    for (int64_t s = 1; s < stages; s++) z = _mm512_add_epi16(z, codeword(s));
    return z;
  }

  // The same of all groups, `tables` of a group's stages one behind the other. Codes are loaded two at a time and put apart by another
  // instruction, since loads bound this; and places that were stored first would hold up loads of codewords at the same place in
  // another page.
  template <int kStages, int kGroups>
  [[gnu::always_inline]] static inline void add_up_all(const char* const (&tables)[kGroups], const uint8_t* codes, __m512i (&z)[kGroups]) {
    unrolled<kGroups * kStages / 2>([&](auto k) __attribute__((always_inline)) {
      uint16_t two;
      std::memcpy(&two, codes + 2 * k, sizeof two);
      const uint64_t places = _pdep_u64(two, 0x00003fc000003fc0);  // in bytes, 32 bits each
      unrolled<2>([&](auto i) __attribute__((always_inline)) {
        constexpr int l = 2 * k + i, p = l % kGroups;
        const uint64_t place = i == 0 ? static_cast<uint32_t>(places) : places >> 32;
        const __m512i codeword = _mm512_loadu_si512(tables[p] + l / kGroups * 256 * 64 + place);
        z[p] = l < kGroups ? codeword : _mm512_add_epi16(z[p], codeword);
        asm("" : "+v"(z[p]));  // else sums are rearranged, and so many places alive that they are put aside
      });
    });
  }

  // Take the queries to the tile's first position, as integers in coded order.
  void turn(int64_t first, int64_t count) {
    const int64_t dim = call_.key.dim;
    const Books& books = *call_.key.books;
    const int32_t* at = call_.positions + b_ * call_.positions_stride + first;
    int32_t low = at[0];
    for (int64_t t = 1; t < count; t++) low = std::min(low, at[t]);
    for (int64_t t = 0; t < count; t++) offset_[t] = static_cast<uint8_t>(at[t] - low);
    if (known_ && low == at_) return;
    // From one tile to the next by the table's turn of 64 positions, now and then afresh, so that rounding does not add up.
    const bool onward = known_ && low == at_ + kRotationTile && ++onwards_ % 64;
    const float *sines = plan_.table->sine.data(), *cosines = plan_.table->cosine.data();
    if (!onward) {
      for (int64_t p = 0; p < books.groups; p++)
        for (int64_t j = 0; j < 16; j++)
          sine_cosine(static_cast<float>(low) * call_.inv_freq[books.channels[p * 32 + j]], &sine_[p * 16 + j],
                      &cosine_[p * 16 + j]);
      sines = sine_.data(), cosines = cosine_.data();
    }
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t p = 0; p < books.groups; p++) {
        const float* from = (onward ? turned_.data() : query_.data()) + r * dim + p * 32;
        const __m512 s = _mm512_loadu_ps(sines + p * 16), c = _mm512_loadu_ps(cosines + p * 16);
        const __m512 x = _mm512_loadu_ps(from), y = _mm512_loadu_ps(from + 16);
        const __m512 low_half = _mm512_fmadd_ps(x, c, _mm512_mul_ps(y, s));
        const __m512 high_half = _mm512_fmsub_ps(y, c, _mm512_mul_ps(x, s));
        _mm512_storeu_ps(&turned_[r * dim + p * 32], low_half);
        _mm512_storeu_ps(&turned_[r * dim + p * 32 + 16], high_half);
        int16_t* to = &integers_[r * dim + p * 32];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(low_half)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(high_half)));
      }
    at_ = low;
    known_ = true;
  }

  // z, integers of group p, rotated.
  [[gnu::always_inline]] static inline __m512i rotated(__m512i z, const int16_t* turn, int64_t p, int64_t groups) {
    const __m256i cosines = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(turn + groups * 32 + p * 16));
    const __m512i swapped = _mm512_shuffle_i64x2(z, z, 0x4e);
    return _mm512_add_epi16(_mm512_mulhrs_epi16(z, _mm512_broadcast_i64x4(cosines)),
                            _mm512_mulhrs_epi16(swapped, _mm512_loadu_si512(turn + p * 32)));
  }

  // Sums of four registers each, their quarters side by side.
  [[gnu::always_inline]] static inline __m512i quarters(const __m512i* acc) {
    const __m512i x = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[0], acc[1]), _mm512_unpackhi_epi32(acc[0], acc[1]));
    const __m512i y = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[2], acc[3]), _mm512_unpackhi_epi32(acc[2], acc[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
  }

  // Scores of four keys, of which `quarters` are known, rows four by four.
  template <int kWidth>
  void put_scores(const __m512i (&quarter)[kWidth / 4][4], float* to) const {
    for (int h = 0; h < kWidth / 4; h++) {
      const __m512i* u = quarter[h];
      const __m512i x = _mm512_add_epi32(_mm512_shuffle_i32x4(u[0], u[1], 0x88), _mm512_shuffle_i32x4(u[0], u[1], 0xdd));
      const __m512i y = _mm512_add_epi32(_mm512_shuffle_i32x4(u[2], u[3], 0x88), _mm512_shuffle_i32x4(u[2], u[3], 0xdd));
      const __m512i whole = _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
      const __m512 result = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_broadcast_f32x4(_mm_loadu_ps(inverse_.data() + 4 * h)));
      if constexpr (kWidth == 4) {
        _mm512_storeu_ps(to, result);
      } else {
        alignas(64) float half[16];  // 128 bits a key: four rows
        _mm512_store_ps(half, result);
        for (int k = 0; k < 4; k++) std::copy_n(half + 4 * k, 4, to + k * kWidth + 4 * h);
      }
    }
  }

  // Scores of `count` keys with their codes in rows of `stride`.
  template <int kWidth, int kGroups, int kStages>
  void tile(const uint8_t* codes, int64_t stride, int64_t count, float* to) {
    static_assert(kGroups * kStages % 2 == 0);
    constexpr bool kHeld = kWidth * kGroups <= 16;  // queries, in registers
    const int16_t *turns = plan_.table->turns.data(), *queries = integers_.data();
    const char* tables[kGroups];
    for (int p = 0; p < kGroups; p++) tables[p] = reinterpret_cast<const char*>(tables_[p]);
    __m512i held[kHeld ? kWidth * kGroups : 1];
    if constexpr (kHeld)
      unrolled<kWidth * kGroups>([&](auto i) __attribute__((always_inline)) {
        held[i] = _mm512_loadu_si512(queries + i * 32);
        asm("" : "+v"(held[i]));
      });
    for (int64_t t = 0; t < count; t += 4) {
      __m512i quarter[kWidth / 4][4];
      for (int k = 0; k < 4; k++) {
        const int64_t at = std::min(t + k, count - 1);
        const int16_t* turn = turns + offset_[at] * kGroups * 48;
        __m512i z[kGroups], acc[kWidth];
        add_up_all<kStages>(tables, codes + at * stride, z);
        unrolled<kWidth>([&](auto r) __attribute__((always_inline)) { acc[r] = _mm512_setzero_si512(); });
        unrolled<kGroups>([&](auto p) __attribute__((always_inline)) {
          const __m512i key = rotated(z[p], turn, p, kGroups);
          unrolled<kWidth>([&](auto r) __attribute__((always_inline)) {
            constexpr int kAt = r * kGroups + p;
            acc[r] = _mm512_dpwssd_epi32(acc[r], key, kHeld ? held[kHeld ? kAt : 0] : _mm512_loadu_si512(queries + kAt * 32));
          });
        });
        for (int h = 0; h < kWidth / 4; h++) quarter[h][k] = quarters(acc + 4 * h);
      }
      put_scores<kWidth>(quarter, to + t * kWidth);
    }
  }

  // The same of any number of groups and stages, of where codewords lie in their tables.
  template <int kWidth, class Place>
  void any_tile(const Place* places, int64_t stride, int64_t count, float* to) {
    const int64_t groups = call_.key.books->groups, stages = call_.key.books->stages;
    for (int64_t t = 0; t < count; t += 4) {
      __m512i quarter[kWidth / 4][4];
      for (int k = 0; k < 4; k++) {
        const int64_t at = std::min(t + k, count - 1);
        const int16_t* turn = plan_.table->turns.data() + offset_[at] * groups * 48;
        __m512i acc[kWidth];
        for (int r = 0; r < kWidth; r++) acc[r] = _mm512_setzero_si512();
        for (int64_t p = 0; p < groups; p++) {
          const __m512i key = rotated(add_up(places + at * stride, p, groups, stages), turn, p, groups);
#pragma GCC unroll 8
          for (int r = 0; r < kWidth; r++)
            acc[r] = _mm512_dpwssd_epi32(acc[r], key, _mm512_loadu_si512(integers_.data() + (r * groups + p) * 32));
        }
        for (int h = 0; h < kWidth / 4; h++) quarter[h][k] = quarters(acc + 4 * h);
      }
      put_scores<kWidth>(quarter, to + t * kWidth);
    }
  }

  const RotatedPlan& plan_;
  const AttendCall& call_;
  int64_t b_, g_, rows_;
  std::vector<float> query_, turned_, inverse_;  // coded order, in units of the integers
  std::vector<float> sine_, cosine_;
  Aligned<int16_t> integers_;  // [8][dim], coded order
  std::vector<const int16_t*> tables_;  // of each code
  bool in_order_ = false;
  std::vector<uint16_t> codes_, near_;  // codes that are no bytes; where codewords of bytes lie, else:
  std::vector<uint32_t> far_;
  uint8_t offset_[kRotationTile] = {};
  int32_t at_ = 0;
  int64_t onwards_ = 0;
  bool known_ = false;
};

#else

struct RotatedPlan {
  bool possible = false;
  explicit RotatedPlan(const AttendCall&) {}
};

struct RotatedScores {
  RotatedScores(const RotatedPlan&, const AttendCall&, int64_t, int64_t, int64_t, int64_t) {}
  template <int kWidth>
  void scores(int64_t, int64_t, float*, Ahead) {}
};

#endif

}  // namespace kvfold
