// Masses times codebooks (attend_step.h) on the matrix unit, where groups share their codebooks: of a stage, the product
//     sums[channel][group, row] += codewords[channel][codeword] . mass[codeword][group, row]
// serves all of them. Masses are sums of two bfloat16 numbers, and so are codewords that are not bfloat16 themselves, of which three of
// four products are formed: off by 2^-17 of the sums.
#pragma once

#include "amx.h"
#include "attend_rows.h"
#include "lanes_avx512.h"

namespace kvfold {

#if defined(__AMX_BF16__)

template <int kWidth>
class UnitMix {
 public:
  // Of a KV head with codebooks `book`.
  static bool serves(const Books& books, const int32_t* book) {
    if (books.groups < 2 || books.dim % kChannels != 0 || books.size % kCodewords != 0) return false;
    for (int64_t l = 0; l < books.codes(); l++)
      if (book[l] != book[l / books.groups * books.groups]) return false;
    return true;
  }

  // As `Rows<kWidth>::mix`.
  static void mix(const Books& books, const int32_t* book, const float* mass, float* sums) {
    const AmxTiles tiles;
    for (int64_t first = 0; first < books.groups; first += kGroups)
      for (int64_t channel = 0; channel < books.dim; channel += kChannels)
        for_set(books, book, mass, first, channel, sums + first * books.dim + channel);
  }

 private:
  static constexpr int64_t kGroups = 16 / kWidth;  // groups whose rows are the columns of a tile
  static constexpr int64_t kChannels = 32, kCodewords = 32;
  static constexpr int64_t kAhead = 2;  // masses are split before their product, so that tiles are not waited for

  static void for_set(const Books& books, const int32_t* book, const float* mass, int64_t first, int64_t channel, float* sums) {
    const Books::Splits& codewords = books.splits();
    const int64_t there = std::min(kGroups, books.groups - first), bunches = books.size / kCodewords, all = books.stages * bunches;
    alignas(64) uint16_t split[kAhead + 1][2][kCodewords * 16];
    const auto split_at = [&](int64_t i) {
      const int64_t l = i / bunches * books.groups + first;
      split_masses(mass + (l * books.size + i % bunches * kCodewords) * kWidth, books.size * kWidth, there, split[i % (kAhead + 1)]);
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < std::min(kAhead, all); i++) split_at(i);
    for (int64_t i = 0; i < all; i++) {
      if (i + kAhead < all) split_at(i + kAhead);
      const auto left = [&](int64_t half, int64_t term) {
        return codewords.of(book[i / bunches * books.groups], i % bunches, channel / 16 + half, term);
      };
      const auto& right = split[i % (kAhead + 1)];
      _tile_loadd(6, right[0], 64);
      _tile_loadd(7, right[1], 64);
      _tile_loadd(4, left(0, 0), 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, left(1, 0), 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      if (codewords.terms < 2) continue;
      _tile_loadd(4, left(0, 1), 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, left(1, 1), 64);
      _tile_dpbf16ps(3, 5, 6);
    }
    alignas(64) float found[4][16][16];
    _tile_stored(0, found[0], 64);
    _tile_stored(1, found[1], 64);
    _tile_stored(2, found[2], 64);
    _tile_stored(3, found[3], 64);
    for (int64_t p = 0; p < there; p++)
      for (int64_t r = 0; r < kWidth; r++)
        for (int64_t j = 0; j < kChannels; j++) {
          const int64_t half = j / 16 * 2, column = p * kWidth + r;
          sums[r * books.head_dim() + p * books.dim + j] = found[half][j % 16][column] + found[half + 1][j % 16][column];
        }
  }

  // Masses of kCodewords codewords of `there` groups, `stride` apart, as right factors: [pairs of codewords][columns][2].
  static void split_masses(const float* mass, int64_t stride, int64_t there, uint16_t (&split)[2][kCodewords * 16]) {
    for (int64_t c = 0; c < kCodewords; c += 4) {
      __m512 x[4];  // some codewords of a group each
      for (int64_t i = 0; i < 4; i++)
        x[i] = i % kGroups < there ? _mm512_load_ps(mass + i % kGroups * stride + (c + i / kGroups * kGroups) * kWidth) : _mm512_setzero_ps();
      kvfold::mix<kGroups>(x);  // all groups of a codeword each
      for (int64_t i = 0; i < 4; i += 2) {
        const __m512 high[2] = {nearest(x[i]), nearest(x[i + 1])};
        const __m512 low[2] = {_mm512_sub_ps(x[i], high[0]), _mm512_sub_ps(x[i + 1], high[1])};
        _mm512_store_si512(split[0] + (c + i) * 16, pairs(high[0], high[1]));
        _mm512_store_si512(split[1] + (c + i) * 16, pairs(low[0], low[1]));
      }
    }
  }

  static constexpr int kUpper = static_cast<int>(0xffff0000);

  static __m512i half_up(__m512 x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); }

  // The nearest bfloat16 numbers, ties upwards: these are sums of thousands of weights.
  static __m512 nearest(__m512 x) { return _mm512_castsi512_ps(_mm512_and_si512(half_up(x), _mm512_set1_epi32(kUpper))); }

  // Those of both, in turn.
  static __m512i pairs(__m512 x, __m512 y) {
    const __m512i first = _mm512_srli_epi32(half_up(x), 16);
    return _mm512_ternarylogic_epi32(first, half_up(y), _mm512_set1_epi32(kUpper), 0xf8);  // first | second & kUpper
  }
};

#else

template <int kWidth>
struct UnitMix {
  static bool serves(const Books&, const int32_t*) { return false; }
  static void mix(const Books&, const int32_t*, const float*, float*) {}
};

#endif

}  // namespace kvfold
