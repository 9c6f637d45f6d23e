// Scores of keys through tables of 16-bit integers that are looked up in registers, 64 keys an instruction (AVX-512 VBMI).
//
// A table of 256 entries is two planes of 256 bytes, four registers each; `vpermi2b` picks 64 bytes from two of them. Codes are
// transposed for that, 512 keys at a time, once for all query heads of a KV head. A bunch of kBunch codes has a step of its own,
// such that no sum of one entry a code leaves 16 bits; bunches are added as 32-bit integers, each times its step.
//
// Error: an entry is off by at most half its bunch's step, and evenly so. `make` says how far off scores are expected to be (root
// mean square); the caller takes float32 tables where that is too much.
#pragma once

#include "attend_parts.h"

namespace kvfold {

constexpr int64_t kByteBlock = 512;  // keys whose codes are transposed together: with a head's table in the first-level cache
constexpr int64_t kByteSize = 256;   // codewords a table

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

inline bool has_byte_tables() {
  static const bool has = __builtin_cpu_supports("avx512vbmi");
  return has;
}

#define KV_VBMI [[gnu::target("avx512vbmi")]]

// What a query head needs for its scores: planes [codes][2][256], low bytes first, and unit, base and steps with
//     score = base + unit * sum over bunches of step * (sum of entries).
struct ByteTables {
  static constexpr int64_t kBunch = 4;
  static constexpr int kLargestStep = 511;  // so that 128 bunches are added without overflow

  uint8_t* planes = nullptr;
  std::vector<int16_t> steps;  // of each bunch
  float unit = 0, base = 0;

  static int64_t bytes(int64_t codes) { return codes * 2 * kByteSize; }

  // From float32 tables [codes][256], entries of each from `low` to `high`. Returns the expected error of a score.
  KV_VBMI float make(const float* tables, const float* low, const float* high, int64_t codes, uint8_t* to) {
    planes = to;
    const int64_t bunches = (codes + kBunch - 1) / kBunch;
    std::vector<float> middle(codes), wanted(bunches, 0.0f);
    double center = 0;
    for (int64_t l = 0; l < codes; l++) {
      middle[l] = 0.5f * (low[l] + high[l]);
      wanted[l / kBunch] += 0.5f * (high[l] - low[l]) * (1.0f / 32760);  // a sum of kBunch roundings more stays within 16 bits
      center += middle[l];
    }
    base = static_cast<float>(center);
    const float largest = *std::max_element(wanted.begin(), wanted.end());
    unit = std::max(largest, 1e-30f) / kLargestStep;
    steps.resize(bunches);
    double square = 0;
    for (int64_t b = 0; b < bunches; b++) {
      steps[b] = static_cast<int16_t>(std::max(1.0f, std::ceil(wanted[b] / unit * 0.9999f)));
      const double step = static_cast<double>(steps[b]) * unit;
      square += step * step / 12 * std::min(kBunch, codes - b * kBunch);
    }
    for (int64_t l = 0; l < codes; l++)
      pack(tables + l * kByteSize, middle[l], 1 / (steps[l / kBunch] * unit), to + l * 2 * kByteSize);
    return static_cast<float>(std::sqrt(square));
  }

  // Scores of kByteBlock keys whose codes were transposed by `turn_codes`.
  KV_VBMI void look_up(const uint8_t* turned, int64_t codes, int64_t count, float* scores) const {
    for (int64_t t = 0; t < count; t += 128, turned += 128 * codes, scores += 128) {
      __m512i sums[8];
      for (__m512i& sum : sums) sum = _mm512_setzero_si512();
      for (int64_t b = 0; b * kBunch < codes; b++) {
        __m512i entries[4] = {};
        const int64_t end = std::min(codes, (b + 1) * kBunch);
        for (int64_t l = b * kBunch; l < end; l++) {
          const uint8_t* plane = planes + l * 2 * kByteSize;
          __m512i low[4], high[4];
          for (int i = 0; i < 4; i++) {
            low[i] = held(plane + 64 * i);
            high[i] = held(plane + kByteSize + 64 * i);
          }
          for (int half = 0; half < 2; half++) {
            const __m512i code = held(turned + (half * codes + l) * 64);
            const __m512i a = pick(low, code), b = pick(high, code);
            entries[2 * half] = _mm512_add_epi16(entries[2 * half], _mm512_unpacklo_epi8(a, b));
            entries[2 * half + 1] = _mm512_add_epi16(entries[2 * half + 1], _mm512_unpackhi_epi8(a, b));
          }
        }
        const __m512i even = _mm512_set1_epi32(static_cast<uint16_t>(steps[b])), odd = _mm512_slli_epi32(even, 16);
        for (int i = 0; i < 4; i++) {
          add_products(sums[2 * i], entries[i], even);
          add_products(sums[2 * i + 1], entries[i], odd);
        }
      }
      for (int i = 0; i < 8; i++) store(scores + 16 * i, (vf)_mm512_cvtepi32_ps(sums[i]) * unit + base);
    }
  }

 private:
  // Loaded into a register; the compiler would rather load it again for every use, which is what bounds this.
  KV_VBMI static __m512i held(const uint8_t* from) {
    __m512i v = _mm512_load_si512(from);
    asm("" : "+v"(v));
    return v;
  }

  // Bytes of a plane that 64 codes name. Codes below 128 are found in the first half and replaced; the others are left to name
  // bytes of the second.
  KV_VBMI static __m512i pick(const __m512i (&plane)[4], __m512i code) {
    const __mmask64 upper = _mm512_movepi8_mask(code);
    const __m512i found = _mm512_mask2_permutex2var_epi8(plane[0], code, ~upper, plane[1]);
    return _mm512_mask2_permutex2var_epi8(plane[2], found, upper, plane[3]);
  }

  KV_VBMI static void pack(const float* table, float middle, float per_step, uint8_t* to) {
    alignas(64) uint8_t order[64];  // the low bytes of two registers of 32-bit integers, then the second ones
    for (int i = 0; i < 32; i++) order[i] = static_cast<uint8_t>(4 * i), order[32 + i] = static_cast<uint8_t>(4 * i + 1);
    const __m512i bytes = _mm512_load_si512(order);
    const auto entries = [&](int64_t c) {
      return (__m512i)_mm512_cvtps_epi32((__m512)((load(table + c) - middle) * per_step));
    };
    for (int64_t c = 0; c < kByteSize; c += 64) {
      const __m512i first = _mm512_permutex2var_epi8(entries(c), bytes, entries(c + 16));
      const __m512i second = _mm512_permutex2var_epi8(entries(c + 32), bytes, entries(c + 48));
      _mm512_store_si512(to + c, _mm512_shuffle_i64x2(first, second, 0x44));
      _mm512_store_si512(to + kByteSize + c, _mm512_shuffle_i64x2(first, second, 0xee));
    }
  }
};

// Codes of 64 keys, of a byte, in rows of `stride`, to [codes][64]. The keys lie in the order that the unpacking in `look_up`
// undoes.
KV_VBMI inline void turn_block(const uint8_t* from, int64_t stride, int64_t codes, uint8_t* to) {
  alignas(64) uint8_t order[64];  // four rows of 16 bytes to 16 times four bytes of a code
  for (int i = 0; i < 64; i++) order[i] = static_cast<uint8_t>(i % 4 * 16 + i / 4);
  const __m512i bytes = _mm512_load_si512(order);
  for (int64_t first = 0; first < codes; first += 16) {
    const auto there = static_cast<__mmask16>((1u << std::min<int64_t>(16, codes - first)) - 1);
    __m512i quads[4][4];
    for (int q = 0; q < 4; q++) {
      __m512i rows[4];
      for (int k = 0; k < 4; k++) {
        const uint8_t* row = from + (32 * (k / 2) + 4 * q + 2 * (k % 2)) * stride + first;
        __m512i four = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(there, row));
        four = _mm512_inserti32x4(four, _mm_maskz_loadu_epi8(there, row + 16 * stride), 1);
        four = _mm512_inserti32x4(four, _mm_maskz_loadu_epi8(there, row + stride), 2);
        four = _mm512_inserti32x4(four, _mm_maskz_loadu_epi8(there, row + 17 * stride), 3);
        rows[k] = _mm512_permutexvar_epi8(bytes, four);
      }
      const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
      const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
      quads[q][0] = _mm512_unpacklo_epi64(a, c), quads[q][1] = _mm512_unpackhi_epi64(a, c);
      quads[q][2] = _mm512_unpacklo_epi64(b, d), quads[q][3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int k = 0; k < 4; k++) {
      const __m512i a = _mm512_shuffle_i32x4(quads[0][k], quads[1][k], 0x44);
      const __m512i b = _mm512_shuffle_i32x4(quads[0][k], quads[1][k], 0xee);
      const __m512i c = _mm512_shuffle_i32x4(quads[2][k], quads[3][k], 0x44);
      const __m512i d = _mm512_shuffle_i32x4(quads[2][k], quads[3][k], 0xee);
      const __m512i turned[4] = {_mm512_shuffle_i32x4(a, c, 0x88), _mm512_shuffle_i32x4(a, c, 0xdd),
                                 _mm512_shuffle_i32x4(b, d, 0x88), _mm512_shuffle_i32x4(b, d, 0xdd)};
      for (int64_t i = 0; i < 4; i++)
        if (const int64_t l = first + 4 * i + k; l < codes) _mm512_store_si512(to + l * 64, turned[i]);
    }
  }
}

// Codes of `count` keys to [ceil(count / 128)][2][codes][64]; `to` is not written where 64 keys are missing.
inline void turn_codes(const uint8_t* from, int64_t stride, int64_t count, int64_t codes, uint8_t* to) {
  for (; count >= 64; count -= 64, from += 64 * stride, to += 64 * codes) turn_block(from, stride, codes, to);
  if (count == 0) return;
  std::vector<uint8_t> rest(64 * codes, 0);
  for (int64_t i = 0; i < count; i++) std::copy_n(from + i * stride, codes, rest.data() + i * codes);
  turn_block(rest.data(), codes, codes, to);
}

#undef KV_VBMI

#else

inline bool has_byte_tables() { return false; }

struct ByteTables {
  const uint8_t* planes = nullptr;
  static int64_t bytes(int64_t) { return 0; }
  float make(const float*, const float*, const float*, int64_t, uint8_t*) { return 0; }
  void look_up(const uint8_t*, int64_t, int64_t, float*) const {}
};

inline void turn_codes(const uint8_t*, int64_t, int64_t, int64_t, uint8_t*) {}

#endif

}  // namespace kvfold
