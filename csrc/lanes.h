// Vectors of float as wide as the instruction set compiled for, by the compiler's vector extension (GCC and Clang, any CPU).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace kvfold {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * lanes)));
typedef int32_t vi __attribute__((vector_size(4 * lanes)));

// f(0), f(1), ... f(kCount - 1), the numbers as types: what they index can stay in registers.
template <class F, int... kNumbers>
[[gnu::always_inline]] inline void unrolled(const F& f, std::integer_sequence<int, kNumbers...>) {
  (f(std::integral_constant<int, kNumbers>()), ...);
}
template <int kCount, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  unrolled(f, std::make_integer_sequence<int, kCount>());
}

inline vf load(const float* from) {
  vf v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Of float16 numbers, given by their bits.
inline vf load_halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  vf v;
  for (int i = 0; i < lanes; i++) {
    _Float16 half;
    std::memcpy(&half, from + i, sizeof half);
    v[i] = static_cast<float>(half);
  }
  return v;
#endif
}

inline void store(float* to, vf v) { std::memcpy(to, &v, sizeof v); }

inline vf splat(float x) { return x - vf{}; }

// Keeps a loaded vector in a register, where the compiler would load it again for every use.
inline vf hold(vf v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#endif
  return v;
}

#if defined(__AVX512VNNI__)
// acc + the products of pairs of 16-bit integers. Of the intrinsic GCC makes three instructions, two to copy the sum.
inline void add_products(__m512i& acc, __m512i a, __m512i b) { asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
#endif

// Bit i says whether element i of a comparison is true.
inline uint32_t bits(vi comparison) {
  uint32_t result = 0;
#if defined(__AVX512DQ__)
  result = _mm512_movepi32_mask((__m512i)comparison);
#elif defined(__AVX2__)
  result = _mm256_movemask_ps((__m256)comparison);
#else
  for (int i = 0; i < lanes; i++) result |= (comparison[i] & 1u) << i;
#endif
  return result;
}

// Elements of the first (kHalf 0) or second halves of `a` and `b`, in turn. GCC would pick them one by one where vectors are long.
template <int kHalf>
inline vf zip(vf a, vf b) {
#if defined(__AVX512F__)
  vi at;
  for (int i = 0; i < lanes; i++) at[i] = kHalf * lanes / 2 + i / 2 + i % 2 * lanes;
  return (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)at, (__m512)b);
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  return (vf)_mm256_permute2f128_ps(low, high, kHalf ? 0x31 : 0x20);
#else
  vf result;
  for (int i = 0; i < lanes; i++) {
    const int at = kHalf * lanes / 2 + i / 2;
    result[i] = i % 2 ? b[at] : a[at];
  }
  return result;
#endif
}

// Rows and columns of a square change places.
inline void transpose(vf (&square)[lanes]) {
  for (int apart = 1; apart < lanes; apart *= 2) {
    vf turned[lanes];
    for (int i = 0; i < lanes / 2; i++) {
      turned[2 * i] = zip<0>(square[i], square[i + lanes / 2]);
      turned[2 * i + 1] = zip<1>(square[i], square[i + lanes / 2]);
    }
    std::memcpy(square, turned, sizeof square);
  }
}

inline vf larger(vf a, vf b) { return a > b ? a : b; }

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < lanes; i++) total += v[i];
  return total;
}

// exp(x) for x <= 88 (or -inf), relative error below 2e-7: 2^n * p(r), n the nearest integer to x / ln 2; 0 below -87.
inline vf exp_of(vf x) {
#if defined(__AVX512F__)
  const __mmask16 large = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
#else
  const vi tiny = x < -87.0f;
  x = larger(x, splat(-87.0f));
#endif
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * 1.44269504f + magic) - magic;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(large, (__m512)p, (__m512)n);
#else
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  vf power;
  std::memcpy(&power, &exponent, sizeof power);
  return tiny ? vf{} : p * power;
#endif
}

// Sine and cosine of any angle that float32 holds to 1e-7 of a turn or better, absolute error below 1e-6. Reduced by pi / 2
// in double precision, so that large angles (positions times frequencies) lose nothing.
inline void sine_cosine(float angle, float* sine, float* cosine) {
  const double turns = static_cast<double>(angle) * 0.63661977236758134;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double nearest = (turns + magic) - magic;
  const float r = static_cast<float>((turns - nearest) * 1.5707963267948966);
  const int32_t quadrant = static_cast<int32_t>(nearest);
  const float square = r * r;
  const float s = r + r * square * (-1.6666654611e-1f + square * (8.3321608736e-3f + square * -1.9515295891e-4f));
  const float c = 1.0f - 0.5f * square +
                  square * square * (4.166664568298827e-2f + square * (-1.388731625493765e-3f + square * 2.443315711809948e-5f));
  const bool swap = quadrant & 1;
  const float first = swap ? c : s, second = swap ? s : c;
  *sine = quadrant & 2 ? -first : first;
  *cosine = (quadrant + 1) & 2 ? -second : second;
}

}  // namespace kvfold
