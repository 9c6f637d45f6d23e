// Codebooks made ready for the kernels: float32 in the layouts they read, checked once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace kvfold {

// Rounded to the nearest, ties to even; not for NaN.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

inline uint16_t to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

// Memory that starts on a cache line, so that no load of a codeword crosses one. Numbers without an initial value have none.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  template <class U, class... Arguments>
  void construct(U* p, Arguments&&... arguments) {
    ::new (static_cast<void*>(p)) U(std::forward<Arguments>(arguments)...);
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};

template <class T>
using Aligned = std::vector<T, LineAllocator<T>>;

// Codebooks `[M, C, d]` and which of them stage s of KV head g, group p uses (`book[S, G, P]`); `channels[P, d]` says which
// channel of a head each entry of a group is. Codes of a token lie stage by stage: code l = s * P + p.
//
// Codebooks that are used are kept in the order of their use, a head's together and a group's stages one behind the other: M is their
// number, and `book` names these.
struct Books {
  int64_t count, size, dim;            // M, C, d
  int64_t stages, heads, groups;       // S, G, P
  std::vector<int32_t> book;           // [G][S * P]: index of the codebook of each code
  std::vector<int32_t> channels;       // [P * d]
  Aligned<float> rows;                 // [M][C][d]
  Aligned<float> half_norms;           // [M][padded C]: ||codeword||^2 / 2; padding is infinite
  std::vector<float> longest;          // [G]: no decoded vector of head g, scale 1, is longer

  // For kernels that add codewords as 16-bit integers: entry j is `values * step[j]`, and no sum of one codeword a stage
  // leaves the range. The step of entries j and j + d / 2 is the same, so that pairs can be rotated.
  struct Integers {
    Aligned<int16_t> values;     // [M][C][d]
    std::vector<float> step;     // [d]
    std::vector<float> longest;  // [G]: as that of the books, in integers
  };
  const Integers& integers() const;  // made at the first call; d is even

  // For products of 16-bit integers: codebook m is `values * step[m]`, two entries of a codeword side by side, of all codewords in
  // turn, [M][pairs of entries][padded C][2]; padding is 0.
  struct Pairs {
    Aligned<int16_t> values;
    std::vector<float> step;  // [M]
    float longest;            // no codeword is longer, in integers
    int64_t pairs;
  };
  const Pairs& pairs() const;  // made at the first call

  // Codewords, negated, in bfloat16, in the tiles that matrix units multiply: [M][padded C / 16][parts of 32 entries][16 pairs of
  // entries][16 codewords][2].
  //
  // Codewords in the same place of the four tiles of a strip are a set. E = |r - C|^2 / 2, got by way of a product with a vector r
  // that is rounded also, is off by no more than |r| slope + (|r|^2 / 2 + E) rounding, and codewords of about the same slope share a set.
  struct Tiles {
    Aligned<uint16_t> halves;
    Aligned<float> half_norms;         // [M][padded C], in the order of the tiles
    Aligned<uint16_t> names;           // [M][padded C], which codeword that is, and one more; 0 for padding
    Aligned<float> slope;              // [M][padded C / 4], of each set
    float rounding;                    // of float32 sums
    int64_t parts;
  };
  const Tiles& tiles() const;  // made at the first call

  // Codewords as sums of bfloat16 numbers, in tiles that matrix units multiply masses with: [M][padded C / 32][parts of 16
  // entries][terms][16 entries][32 codewords], the larger number first; dim is a multiple of 16. One term is enough for codebooks of
  // bfloat16 or less (float8), else there are two.
  struct Splits {
    Aligned<uint16_t> halves;
    int64_t parts, bunches, terms;
    const uint16_t* of(int64_t m, int64_t bunch, int64_t part, int64_t term) const {
      return halves.data() + (((m * bunches + bunch) * parts + part) * terms + term) * 512;
    }
  };
  const Splits& splits() const;  // made at the first call

  // Codewords in float16, [M][C][d], where every entry is one exactly (codebooks of float16 or less): half as much to read. Else
  // null. Made at the first call.
  const uint16_t* halves() const;

  // [d][padded C] of codebook m: entry j of all codewords side by side; padding is 0. Made at the first call.
  const float* columns(int64_t m) const;

  int64_t codes() const { return stages * groups; }
  int64_t head_dim() const { return groups * dim; }
  int64_t padded_size() const { return (size + 63) / 64 * 64; }
  const float* table(int64_t m) const { return rows.data() + m * size * dim; }

  // Throws std::invalid_argument if `book` names a codebook that is not there, or `channels` is no permutation.
  Books(const float* codebooks, int64_t count, int64_t size, int64_t dim, const int64_t* book, int64_t stages, int64_t heads,
        int64_t groups, const int64_t* channels);

 private:
  mutable std::once_flag columns_made, halves_made, integers_made, pairs_made, splits_made, tiles_made;
  mutable Aligned<float> columns_;
  mutable Aligned<uint16_t> halves_;  // empty if they would not be exact
  mutable Integers integers_;
  mutable Pairs pairs_;
  mutable Splits splits_;
  mutable Tiles tiles_;
};

}  // namespace kvfold
