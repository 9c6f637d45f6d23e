// Sums, sorts and orders across and between AVX-512 registers that the compiler's vectors cannot say.
#pragma once

#if defined(__AVX512F__)

#include <immintrin.h>

#include <cstdint>

namespace kvfold {

inline __mmask16 lanes_left(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1); }

inline __m512i bytes_upwards() {
  alignas(64) static constexpr uint8_t upwards[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                      22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
                                                      44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  return _mm512_load_si512(upwards);
}

// (a0 + a2, b0 + b2, a1 + a3, b1 + b3) of each 128 bits.
inline __m512 pair_sums(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }

// In each 128 bits the sums of four registers' 128 bits there.
inline __m512 quad_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d low = _mm512_castps_pd(pair_sums(a, b)), high = _mm512_castps_pd(pair_sums(c, d));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
}

inline __m512 halves_added(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

inline __m512 sums_of_16(const __m512 (&x)[16]) {
  const __m512 low = halves_added(quad_sums(x[0], x[1], x[2], x[3]), quad_sums(x[4], x[5], x[6], x[7]));
  const __m512 high = halves_added(quad_sums(x[8], x[9], x[10], x[11]), quad_sums(x[12], x[13], x[14], x[15]));
  return halves_added(low, high);
}

// x[j] becomes, in 128 bits q, number 4 q + j of each of the four.
inline void transpose_4(__m512 (&x)[4]) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

inline void in_order(__m512& a, __m512& b) {
  const __m512 low = _mm512_min_ps(a, b);
  b = _mm512_max_ps(a, b);
  a = low;
}

// The lowest number of each of four registers.
inline __m128 first_of_16(__m512 (&x)[4]) {
  transpose_4(x);
  const __m512 low = _mm512_min_ps(_mm512_min_ps(x[0], x[1]), _mm512_min_ps(x[2], x[3]));
  const __m256 half = _mm256_min_ps(_mm512_castps512_ps256(low), _mm512_extractf32x8_ps(low, 1));
  return _mm_min_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The fourth lowest number of each of four registers: sorted fours, of which pairs are merged twice.
inline __m128 fourth_of_16(__m512 (&x)[4]) {
  transpose_4(x);
  in_order(x[0], x[1]);
  in_order(x[2], x[3]);
  in_order(x[0], x[2]);
  in_order(x[1], x[3]);
  in_order(x[1], x[2]);
  __m512 other[4];
  for (int j = 0; j < 4; j++) other[j] = _mm512_shuffle_f32x4(x[3 - j], x[3 - j], 0xb1);
  for (int j = 0; j < 4; j++) x[j] = _mm512_min_ps(x[j], other[j]);
  in_order(x[0], x[2]);
  in_order(x[1], x[3]);
  in_order(x[0], x[1]);
  in_order(x[2], x[3]);
  for (int j = 0; j < 4; j++) other[j] = _mm512_shuffle_f32x4(x[3 - j], x[3 - j], 0x4e);
  for (int j = 0; j < 4; j++) x[j] = _mm512_min_ps(x[j], other[j]);
  return _mm512_castps512_ps128(_mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
}

// Of registers two by two, or all four: the k-th gets the k-th part of each one's lanes.
template <int kGroups>
inline void mix(__m512 (&x)[4]) {
  if (kGroups == 1) return;
  for (int k = 0; k < 4; k += 2) {
    const __m512 first = x[k], second = x[k + 1];
    x[k] = _mm512_shuffle_f32x4(first, second, 0x44);
    x[k + 1] = _mm512_shuffle_f32x4(first, second, 0xee);
  }
  if (kGroups == 2) return;
  const __m512 a = x[0], b = x[1], c = x[2], d = x[3];
  x[0] = _mm512_shuffle_f32x4(a, c, 0x88);
  x[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
  x[2] = _mm512_shuffle_f32x4(b, d, 0x88);
  x[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

// best[k]: of each of eight lists, of which the longest has `most` numbers, the k-th lowest, or `none`, which is above all.
template <int kWanted>
inline void lowest_of_8_lists(const uint64_t* numbers, const int32_t* starts, const int32_t* counts, int32_t most, __m512d none,
                              __m512d (&best)[kWanted]) {
  for (__m512d& one : best) one = none;
  const __m256i start = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(starts));
  const __m256i count = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(counts));
  for (int32_t k = 0; k < most; k++) {
    const __m256i at = _mm256_add_epi32(start, _mm256_set1_epi32(k));
    __m512d x = _mm512_mask_i32gather_pd(none, _mm256_cmpgt_epi32_mask(count, _mm256_set1_epi32(k)), at, numbers, 8);
    for (__m512d& one : best) {
      const __m512d low = _mm512_min_pd(one, x);
      x = _mm512_max_pd(one, x);
      one = low;
    }
  }
}

// 8 rows of 4 of the lower 8 numbers of four registers, those of a row side by side.
template <class Number>
inline void rows_of_4(const __m512i* x, Number* to) {
  const __m512i low = _mm512_inserti64x4(x[0], _mm512_castsi512_si256(x[1]), 1), high = _mm512_inserti64x4(x[2], _mm512_castsi512_si256(x[3]), 1);
  const __m512i four = _mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi32(low, four, high));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi32(low, _mm512_add_epi32(four, _mm512_set1_epi32(4)), high));
}

// 64-bit numbers of their lower and upper halves.
inline void interleave(__m512i low, __m512i high, uint64_t* to) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi32(low, first, high));
  _mm512_storeu_si512(to + 8, _mm512_permutex2var_epi32(low, second, high));
}

constexpr int64_t kGathered = 1 << 20;  // bytes that numbers may be apart

// The 4 bytes at each of 16 places `apart` bytes from one another.
inline __m512i words_of_16(const void* from, int64_t apart) {
  const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(static_cast<int>(apart)));
  return _mm512_i32gather_epi32(places, from, 1);
}

// 16 numbers, `apart` bytes, 4 or more, one from the other: an element at a time they pass through one port, twice.
inline void gather_16(const void* from, int64_t apart, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(words_of_16(from, apart)));
}
inline void gather_16(const void* from, int64_t apart, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words_of_16(from, apart)));
}

inline __m128i quarter(__m512i x, int64_t k) {
  switch (k) {
    case 0: return _mm512_castsi512_si128(x);
    case 1: return _mm512_extracti32x4_epi32(x, 1);
    case 2: return _mm512_extracti32x4_epi32(x, 2);
    default: return _mm512_extracti32x4_epi32(x, 3);
  }
}

}  // namespace kvfold

#endif
