// The best candidates of every vector of the search on the matrix unit (encode_amx.h), of eight vectors at once.
//
// A key is a candidate's half error and, below it, what it is, row << 16 | codeword: as numbers of double precision keys order as
// (error, row, codeword).
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "lanes.h"
#include "lanes_avx512.h"

#if defined(__AMX_BF16__)

namespace kvfold {

constexpr uint64_t kNoKey = 0x7fe0000000000000;  // above every key; codeword 0 of row 0
constexpr uint32_t kKeyStep = 1 << 20;           // of an error's exponent: then no key is denormal or infinite

// Of eight vectors with keys from `starts` on, `counts` of them and `most` at most; as `choose_best`.
template <int kWanted>
inline void choose_of_8(const uint64_t* keys, const int32_t* starts, const int32_t* counts, int32_t most, int64_t room, uint32_t* chosen,
                        float* half_errors) {
  __m512d best[kWanted];
  lowest_of_8_lists(keys, starts, counts, most, _mm512_castsi512_pd(_mm512_set1_epi64(kNoKey)), best);
  __m512i names[kWanted], errors[kWanted];
  for (int k = 0; k < kWanted; k++) {
    names[k] = _mm512_castsi256_si512(_mm512_cvtepi64_epi32((__m512i)best[k]));
    const __m512i upper = _mm512_castsi256_si512(_mm512_cvtepi64_epi32(_mm512_srli_epi64((__m512i)best[k], 32)));
    errors[k] = _mm512_sub_epi32(upper, _mm512_set1_epi32(kKeyStep));
  }
  if (kWanted == 4 && room == 4) {
    rows_of_4(names, chosen);
    rows_of_4(errors, half_errors);
    return;
  }
  alignas(64) uint32_t columns[2][kWanted][16];
  for (int k = 0; k < kWanted; k++) {
    _mm512_store_si512(columns[0][k], names[k]);
    _mm512_store_si512(columns[1][k], errors[k]);
  }
  for (int64_t i = 0; i < 8; i++)
    for (int64_t k = 0; k < std::min<int64_t>(kWanted, room); k++) {
      chosen[i * room + k] = columns[0][k][i];
      std::memcpy(half_errors + i * room + k, &columns[1][k][i], 4);
    }
}

// The `wider` best candidates of each of the vectors `first` to `last - 1`, ascending, to chosen[vector * room] on, and their half
// errors, infinite where there are fewer than `room`. ends[vector]: where its keys end, 0 if it has none. Writes up to eight vectors
// more.
inline void choose_best(const uint64_t* keys, const int32_t* ends, int64_t wider, int64_t room, int64_t first, int64_t last,
                        uint32_t* chosen, float* half_errors) {
  int64_t end = 0;
  for (int64_t v = first; v < last; v += 8) {
    alignas(32) int32_t starts[8] = {}, counts[8] = {};
    int32_t most = 0;
    for (int64_t i = 0; i < std::min<int64_t>(8, last - v); i++) {
      starts[i] = static_cast<int32_t>(end);
      end = std::max<int64_t>(end, ends[v + i]);
      counts[i] = static_cast<int32_t>(end) - starts[i];
      most = std::max(most, counts[i]);
    }
    uint32_t* const to = chosen + v * room;
    float* const halves = half_errors + v * room;
    if (wider == 1)
      choose_of_8<1>(keys, starts, counts, most, room, to, halves);
    else if (wider <= 4)
      choose_of_8<4>(keys, starts, counts, most, room, to, halves);
    else
      choose_of_8<16>(keys, starts, counts, most, room, to, halves);
    for (int64_t i = 0; wider < room && i < 8; i++)
      std::fill_n(halves + i * room + wider, room - wider, std::numeric_limits<float>::infinity());
  }
}

}  // namespace kvfold

#endif
