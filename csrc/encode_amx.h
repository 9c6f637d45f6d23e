// The search of encode.cpp with the scores from the CPU's matrix unit (AMX, bfloat16), where it has one.
//
// Rounding both to bfloat16 leaves scores an error with a proven bound. Every codeword that this error could place among the best,
// one or two more than are wanted, is scored anew in float32: the codes are those of a search in float32.
//
// 16 partial codes, those of one or several vectors, go through a stage together, and nothing branches on a number: lowest scores of
// sets of four codewords, from these a limit for each vector, the sets and of them the codewords within the limit, their errors,
// which are the squares of what would be left, and the best of eight vectors at once.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "encode_choose.h"
#include "kernels.h"
#include "lanes.h"
#include "lanes_avx512.h"

#include "amx.h"

#if defined(__AMX_BF16__)

namespace kvfold {

class AmxEncoder {
 public:
  static constexpr int64_t kRows = 16;  // partial codes of a tile

  static bool serves(int64_t beam) { return beam <= kRows; }

  AmxEncoder(const Books& books, int64_t beam)
      : books_(books),
        tiles_(books.tiles()),
        beam_(beam),
        dim_(tiles_.parts * 32),
        padded_(books.padded_size()),
        chunks_((padded_ + 255) / 256),
        room_(1) {
    while (room_ < beam) room_ *= 2;
    errors_.resize(kRows * padded_);
    lowest_.assign(kRows * chunks_ * 64, kInfinity);
    sets_.resize(kRows * chunks_ * 64 + 64);
    candidates_.resize(kMany + kRows * padded_ + 64);
    keys_.resize(candidates_.size());
  }

  // Codes [count][`stages`] of vectors [count][dim], at `code_stride` and `stride`; stage s uses codebook `book[s * book_stride]`.
  struct Block {
    const float* vectors;
    int64_t stride, count;
    const int32_t* book;
    int64_t book_stride;
    int32_t* codes;
    int64_t code_stride, stage_stride;
  };

  void encode(const Block& block) {
    const int64_t depth = books_.stages, count = block.count;
    make_room(count);
    for (int64_t i = 0; i < count; i++) {
      const float* x = block.vectors + i * block.stride;
      __m512 square = _mm512_setzero_ps();
      for (int64_t j = 0; j < dim_; j += 32) {
        const __m512 low = part<false>(x, j), high = part<false>(x, j + 16);
        put(sides_[0], i * dim_ + j, low, high);
        square = _mm512_fmadd_ps(low, low, _mm512_fmadd_ps(high, high, square));
      }
      sides_[0].half_square[i] = 0.5f * _mm512_reduce_add_ps(square);
    }
    const AmxTiles tiles;
    int64_t width = 1, room = 1;
    for (int64_t s = 0; s < depth; s++) {
      const bool last = s + 1 == depth;  // of the last stage the best alone counts
      const Stage stage{block.book[s * block.book_stride], room, last ? 1 : std::min(beam_, width * books_.size), last};
      Side &from = sides_[s % 2], &to = sides_[1 - s % 2];
      const int64_t rows = count * room;
      std::fill(from.half_square.begin() + rows, from.half_square.begin() + (rows + kRows - 1) / kRows * kRows, kInfinity);
      int64_t found = 0, done = 0;
      for (int64_t first = 0; first < rows; first += kRows) {
        found = collect(stage, from, first, found);
        const int64_t vectors = std::min(count, (first + kRows) / room);
        if (found < kMany && vectors < count) continue;
        rescore(stage, from, found);
        choose_best(keys_.data(), ends_.data(), stage.wider, room_, done, vectors, &steps_[s * most_rows_], to.half_square.data());
        if (!last && books_.dim == 32)
          descend<true>(stage, from, to, done * room_, vectors * room_, &steps_[s * most_rows_]);
        else if (!last)
          descend<false>(stage, from, to, done * room_, vectors * room_, &steps_[s * most_rows_]);
        found = 0;
        done = vectors;
      }
      width = stage.wider;
      room = room_;
    }
    for (int64_t i = 0; i < count; i++)
      for (int64_t s = depth - 1, row = i * room_; s >= 0; s--) {
        const uint32_t step = steps_[s * most_rows_ + row];
        block.codes[i * block.code_stride + s * block.stage_stride] = static_cast<int32_t>(step & 0xffff);
        row = step >> 16;
      }
  }

 private:
  // For blocks of `count` vectors: a decode step has few, and fresh memory takes as long as they do.
  void make_room(int64_t count) {
    const int64_t rows = (count * room_ + kRows - 1) / kRows * kRows;
    if (rows <= most_rows_) return;
    most_rows_ = rows;
    for (Side& side : sides_) {
      side.residual.assign(rows * dim_, 0.0f);
      side.rounded.assign(rows * dim_, 0);
      side.half_square.resize(rows + 8 * kRows);
    }
    ends_.resize(rows / room_);
    steps_.assign(books_.stages * rows + 8 * kRows, 0);
  }

  struct Stage {
    int64_t m, room, wider;  // codebook; rows a vector has; partial codes wanted of each vector
    bool last;
  };
  // Partial codes: `room` rows a vector, of which those not used have an infinite square.
  struct Side {
    Aligned<float> residual;     // [rows][dim_]
    Aligned<uint16_t> rounded;   // [rows][dim_]
    Aligned<float> half_square;  // [rows]
  };

  // Entries j to j + 15 of a codeword or vector, zeros behind its end.
  template <bool k32>
  __m512 part(const float* x, int64_t j) const {
    return k32 ? _mm512_loadu_ps(x + j) : _mm512_maskz_loadu_ps(lanes_left(books_.dim - j), x + j);
  }

  // Writes 32 entries of a residual, also rounded.
  static void put(Side& side, int64_t at, __m512 low, __m512 high) {
    _mm512_store_ps(&side.residual[at], low);
    _mm512_store_ps(&side.residual[at + 16], high);
    _mm512_store_si512(&side.rounded[at], (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }

  // errors_[codeword / 16][row][codeword % 16] = ||C||^2 / 2 - r . C, nearly, of 16 rows, and the lowest of each set of four,
  // plus what the set's slope says it may be off.
  //
  // The unit's results are stored a strip of 64 codewords later, and read yet another strip later: neither is waited for.
  template <int kStrips>  // 0: any
  void score(int64_t m, const uint16_t* rows) {
    const int64_t parts = tiles_.parts, strips = kStrips ? kStrips : padded_ / 64;
    const float* half_norms = tiles_.half_norms.data() + m * padded_;  // a row for all: sums start with it
    const uint16_t* tile = tiles_.halves.data() + m * padded_ / 16 * parts * 512;
    const float* slopes = &tiles_.slope[m * padded_ / 4];
    if (parts == 1) {
      _tile_loadd(4, rows, 64);
      // Quarter `sum` of strip s by way of tile `right`; names of tiles are part of an instruction, so no function can take them.
#define KV_QUARTER(sum, right)                          \
  if (s) _tile_stored(sum, before + sum * 256, 64);     \
  if (s < strips) {                                     \
    _tile_loadd(sum, half_norms + sum * 16, 0);         \
    _tile_loadd(right, tile + sum * 512, 64);           \
    _tile_dpbf16ps(sum, 4, right);                      \
  }                                                     \
  if (s > 1) lowest_of_sets(slopes, s - 2, sum * 4);
#pragma GCC unroll(5)
      for (int64_t s = 0; s <= strips; s++, half_norms += 64, tile += 2048) {
        float* before = &errors_[(s - 1) * 1024];
        KV_QUARTER(0, 5)
        KV_QUARTER(1, 6)
        KV_QUARTER(2, 5)
        KV_QUARTER(3, 6)
      }
#undef KV_QUARTER
    } else {
      for (int64_t s = 0; s < 4 * strips; s++) {
        _tile_loadd(0, half_norms + 16 * s, 0);
        for (int64_t part = 0; part < parts; part++, tile += 512) {
          _tile_loadd(4, rows + part * 32, dim_ * 2);
          _tile_loadd(5, tile, 64);
          _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, &errors_[s * 256], 64);
        if (s > 3 && s % 4 == 3)
          for (int64_t r = 0; r < kRows; r += 4) lowest_of_sets(slopes, s / 4 - 1, r);
      }
    }
    for (int64_t r = 0; r < kRows; r += 4) lowest_of_sets(slopes, strips - 1, r);
  }

  // Of four rows.
  void lowest_of_sets(const float* slopes, int64_t strip, int64_t row) {
    const __m512 slope = _mm512_load_ps(slopes + strip * 16);
    for (int64_t r = row; r < row + 4; r++) {
      const float* e = &errors_[strip * 1024 + r * 16];
      const __m512 first = _mm512_min_ps(_mm512_load_ps(e), _mm512_load_ps(e + 256));
      const __m512 second = _mm512_min_ps(_mm512_load_ps(e + 512), _mm512_load_ps(e + 768));
      _mm512_store_ps(lowest(strip, r), _mm512_fmadd_ps(slope, _mm512_set1_ps(lengths_[r]), _mm512_min_ps(first, second)));
    }
  }

  float* lowest(int64_t strip, int64_t row) { return &lowest_[(strip * kRows + row) * 16]; }

  // Candidates of 16 rows from `first` on, behind the `found` that are there; returns how many there are now.
  int64_t collect(const Stage& stage, const Side& from, int64_t first, int64_t found) {
    const float* half_squares = &from.half_square[first];
    const __m512 half = _mm512_loadu_ps(half_squares);
    const __mmask16 used = _mm512_cmp_ps_mask(half, _mm512_set1_ps(kInfinity), _CMP_LT_OQ);
    _mm512_store_ps(lengths_, _mm512_maskz_sqrt_ps(used, _mm512_add_ps(half, half)));
    if (padded_ == 256)
      score<4>(stage.m, &from.rounded[first * dim_]);
    else
      score<0>(stage.m, &from.rounded[first * dim_]);
    const char* next = reinterpret_cast<const char*>(&from.rounded[first * dim_] + kRows * dim_);  // what the unit will wait for
    for (int64_t r = 0; r < kRows; r++) _mm_prefetch(next + r * 2 * dim_, _MM_HINT_T0);
    if (padded_ == 256 && stage.room == 4)
      bounds<4, 4>(stage, half_squares);
    else if (padded_ == 256 && stage.room == 1)
      bounds<1, 4>(stage, half_squares);
    else
      bounds<0, 0>(stage, half_squares);
    return candidates_within(stage.m, padded_ == 256 ? sets_within<4>(stage.m) : sets_within<0>(stage.m), first, found);
  }

  // bounds_[row]: a score that is above it by more than the row's length times the slope belongs to none of the `wider` best of its
  // vector: as many half errors, `half_square + score`, are below the limit after what they may be off was added.
  template <int kRoom, int kStrips>  // 0: any
  void bounds(const Stage& stage, const float* half_squares) {
    const int64_t room = kRoom ? kRoom : stage.room;
    const __m512 half = _mm512_loadu_ps(half_squares), infinity = _mm512_set1_ps(kInfinity);
    const __mmask16 used = _mm512_cmp_ps_mask(half, infinity, _CMP_LT_OQ);
    const __m512 off = _mm512_fmadd_ps(half, _mm512_set1_ps(tiles_.rounding), _mm512_set1_ps(1e-30f));
    alignas(64) float above[kRows], limits[kRows];
    _mm512_store_ps(above, _mm512_add_ps(half, off));
    if (stage.wider <= 4)
      limits_of<1, kRoom, kStrips>(stage, above, limits);
    else if (stage.wider <= 8)
      limits_of<2, kRoom, kStrips>(stage, above, limits);
    else
      limits_of<4, kRoom, kStrips>(stage, above, limits);
    __m512i of_row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    of_row = _mm512_srl_epi32(of_row, _mm_cvtsi32_si128(__builtin_ctz(static_cast<unsigned>(room))));
    __m512 limit = _mm512_permutexvar_ps(of_row, _mm512_load_ps(limits));
    limit = _mm512_min_ps(_mm512_fmadd_ps(limit, _mm512_set1_ps(3 * tiles_.rounding), limit), _mm512_set1_ps(FLT_MAX));
    _mm512_store_ps(bounds_, _mm512_sub_ps(limit, _mm512_mask_sub_ps(infinity, used, half, off)));
  }

  // limits[vector]: what at least `wider` of its candidates do not exceed. The lowest of 16 sets of candidates tell it for one of
  // them or for four. For more, the candidates are divided into kGroups, of each of which four do not exceed the group's limit.
  template <int kGroups, int kRoom, int kStrips>
  void limits_of(const Stage& stage, const float* above, float* limits) {
    const int64_t room = kRoom ? kRoom : stage.room, strips = kStrips ? kStrips : padded_ / 64, vectors = kRows / room;
    for (int64_t first = 0; first < vectors; first += 4 / kGroups) {
      __m512 least[4];
      for (__m512& group : least) group = _mm512_set1_ps(kInfinity);
      for (int64_t k = 0; k < std::min<int64_t>(4 / kGroups, vectors); k++)
        for (int64_t r = (first + k) * room; r < (first + k + 1) * room; r++) {
          __m512 low[kGroups];
          for (__m512& group : low) group = _mm512_set1_ps(kInfinity);
          for (int64_t s = 0; s < strips; s++) low[s % kGroups] = _mm512_min_ps(low[s % kGroups], _mm512_load_ps(lowest(s, r)));
          for (int64_t i = 0; i < kGroups; i++)
            least[k * kGroups + i] = _mm512_min_ps(least[k * kGroups + i], _mm512_add_ps(low[i], _mm512_set1_ps(above[r])));
        }
      if (stage.wider == 1) {
        _mm_store_ps(limits + first, first_of_16(least));
        continue;
      }
      mix<kGroups>(least);  // a group's candidates have lanes of their own, from all strips
      alignas(16) float fourth[4];
      _mm_store_ps(fourth, fourth_of_16(least));
      for (int64_t k = 0; k < 4 / kGroups; k++) limits[first + k] = *std::max_element(fourth + k * kGroups, fourth + (k + 1) * kGroups);
    }
  }

  // Sets that reach their row's bound, as row << 16 | set.
  template <int kStrips>
  int64_t sets_within(int64_t m) {
    const float* slopes = &tiles_.slope[m * padded_ / 4];
    int64_t count = 0;
    for (int64_t r = 0; r < kRows; r++) {
      const __m512 bound = _mm512_set1_ps(bounds_[r]), twice = _mm512_set1_ps(2 * lengths_[r]);
      for (int64_t q = 0; q < (kStrips ? (kStrips + 3) / 4 : chunks_); q++) {
        __mmask16 parts[4];
        for (int64_t k = 0; k < 4; k++) {
          const __m512 slope = kStrips || 4 * q + k < padded_ / 64 ? _mm512_load_ps(slopes + (4 * q + k) * 16) : _mm512_setzero_ps();
          parts[k] = _mm512_cmp_ps_mask(_mm512_load_ps(lowest(4 * q + k, r)), _mm512_fmadd_ps(slope, twice, bound), _CMP_LE_OQ);
        }
        const __mmask32 low = _mm512_kunpackw(parts[1], parts[0]), high = _mm512_kunpackw(parts[3], parts[2]);
        const __mmask64 within = _mm512_kunpackd(high, low);
        const __m512i places = _mm512_maskz_compress_epi8(within, bytes_upwards());
        const __m512i tag = _mm512_set1_epi32(static_cast<int>(r << 16 | q << 6));
        _mm512_storeu_si512(&sets_[count], _mm512_or_si512(tag, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(places))));
        const int64_t more = _mm_popcnt_u64(within);
        for (int64_t k = 1; 16 * k < more; k++)
          _mm512_storeu_si512(&sets_[count + 16 * k], _mm512_or_si512(tag, _mm512_cvtepu8_epi32(quarter(places, k))));
        count += more;
      }
    }
    return count;
  }

  // Codewords that reach their row's bound, as row << 16 | place in the tiles, in the order of rows.
  int64_t candidates_within(int64_t m, int64_t sets, int64_t first, int64_t found) {
    const __m512 bounds = _mm512_load_ps(bounds_), lengths = _mm512_load_ps(lengths_);
    const float* slopes = &tiles_.slope[m * padded_ / 4];
    for (int64_t i = 0; i < sets; i += 16) {
      const __mmask16 there = lanes_left(sets - i);
      const __m512i tag = _mm512_loadu_si512(&sets_[i]);
      const __m512i row = _mm512_srli_epi32(tag, 16), set = _mm512_and_si512(tag, _mm512_set1_epi32(0xffff));
      const __m512i strip = _mm512_srli_epi32(set, 4), lane = _mm512_and_si512(set, _mm512_set1_epi32(15));
      const __m512i place = _mm512_add_epi32(_mm512_slli_epi32(strip, 10), _mm512_add_epi32(_mm512_slli_epi32(row, 4), lane));
      const __m512i code = _mm512_or_si512(_mm512_slli_epi32(strip, 6), lane);
      const __m512i id = _mm512_or_si512(_mm512_slli_epi32(_mm512_add_epi32(row, _mm512_set1_epi32(static_cast<int>(first))), 16), code);
      const __m512 slope = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, set, slopes, 4);
      const __m512 bound = _mm512_fmadd_ps(slope, _mm512_permutexvar_ps(row, lengths), _mm512_permutexvar_ps(row, bounds));
      uint64_t within = 0;  // bit 4 i + k: the k-th codeword of set i
      for (int k = 0; k < 4; k++) {
        const __m512 error = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, place, &errors_[256 * k], 4);
        within |= _pdep_u64(_mm512_mask_cmp_ps_mask(there, error, bound, _CMP_LE_OQ), 0x1111111111111111 << k);
      }
      const __m512i chosen = _mm512_maskz_compress_epi8(within, bytes_upwards());
      const int64_t more = __builtin_popcountll(within);
      for (int64_t k = 0; 16 * k < more; k++) {
        const __m512i place_of = _mm512_cvtepu8_epi32(quarter(chosen, k));
        const __m512i offset = _mm512_slli_epi32(_mm512_and_si512(place_of, _mm512_set1_epi32(3)), 4);
        const __m512i own = _mm512_permutexvar_epi32(_mm512_srli_epi32(place_of, 2), id);
        _mm512_storeu_si512(&candidates_[found + 16 * k], _mm512_add_epi32(own, offset));
      }
      found += more;
    }
    return found;
  }

  // keys_[i]: the candidate's half error and, below it, what it is: as numbers they order as (error, row, codeword). ends_[v]:
  // where those of vector v end; 0 if there is none, as for one with NaN.
  void rescore(const Stage& stage, const Side& from, int64_t count) {
    const int shift = 16 + __builtin_ctz(static_cast<unsigned>(stage.room));
    std::fill(ends_.begin(), ends_.end(), 0);
    for (int64_t i = 0; i < count; i++) ends_[candidates_[i] >> shift] = static_cast<int32_t>(i + 1);
    _mm512_storeu_si512(&candidates_[count], _mm512_setzero_si512());
    const uint16_t* names = &tiles_.names[stage.m * padded_];
    for (int64_t i = 0; i < count; i += 16) {
      const __m512i place = _mm512_loadu_si512(&candidates_[i]);
      const __m512i name = _mm512_i32gather_epi32(_mm512_and_si512(place, _mm512_set1_epi32(0xffff)), names, 2);
      const __m512i id = _mm512_mask_mov_epi16(place, 0x55555555, name);
      _mm512_storeu_si512(&candidates_[i], id);
      const __m512 square = books_.dim == 32 ? squares_of_16<true>(stage.m, from, i) : squares_of_16<false>(stage.m, from, i);
      const __m512 half = _mm512_mul_ps(square, _mm512_set1_ps(0.5f));
      interleave(id, _mm512_add_epi32((__m512i)half, _mm512_set1_epi32(kKeyStep)), &keys_[i]);
    }
  }

  // |r - C|^2 of candidates i to i + 15.
  template <bool k32>
  __m512 squares_of_16(int64_t m, const Side& from, int64_t i) const {
    const float *table = books_.table(m), *residuals = from.residual.data();
    __m512 squares[16];
#pragma GCC unroll(16)
    for (int k = 0; k < 16; k++) {
      const uint32_t id = candidates_[i + k];
      const float *a = residuals + (id >> 16) * (k32 ? 32 : dim_), *b = table + (id & 0xffff) * books_.dim;
      const __m512 first = _mm512_sub_ps(_mm512_load_ps(a), part<k32>(b, 0));
      squares[k] = _mm512_mul_ps(first, first);
      for (int64_t j = 16; j < (k32 ? 32 : dim_); j += 16) {
        const __m512 left = _mm512_sub_ps(_mm512_load_ps(a + j), part<k32>(b, j));
        squares[k] = _mm512_fmadd_ps(left, left, squares[k]);
      }
    }
    return sums_of_16(squares);
  }

  // The partial codes `chosen` become rows `first` to `last - 1` of the next stage.
  template <bool k32>
  void descend(const Stage& stage, const Side& from, Side& to, int64_t first, int64_t last, const uint32_t* chosen) {
    const float* table = books_.table(stage.m);
    for (int64_t row = first; row < last; row++) {
      const uint32_t id = chosen[row];
      const float *parent = &from.residual[(id >> 16) * (k32 ? 32 : dim_)], *codeword = table + (id & 0xffff) * books_.dim;
      for (int64_t j = 0; j < (k32 ? 32 : dim_); j += 32) {
        const __m512 low = _mm512_sub_ps(_mm512_load_ps(parent + j), part<k32>(codeword, j));
        const __m512 high = _mm512_sub_ps(_mm512_load_ps(parent + j + 16), part<k32>(codeword, j + 16));
        put(to, row * (k32 ? 32 : dim_) + j, low, high);
      }
    }
  }

  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr int64_t kMany = 2048;                 // candidates that are rescored together, and those of one more tile

  const Books& books_;
  const Books::Tiles& tiles_;
  int64_t beam_, dim_, padded_, chunks_, room_;  // dim_: padded to whole tiles; chunks_ of 256 codewords, 64 sets; rows of a vector
  int64_t most_rows_ = 0;
  Side sides_[2];                                // read at even and at odd stages
  Aligned<float> errors_;                        // [padded_ / 16][16][16]
  Aligned<float> lowest_;                        // [chunks_ * 4][16][16]
  Aligned<uint32_t> sets_, candidates_;
  Aligned<uint64_t> keys_;
  std::vector<int32_t> ends_;  // [vectors]
  Aligned<uint32_t> steps_;    // [stages][rows]: parent's row << 16 | code
  alignas(64) float bounds_[kRows], lengths_[kRows];
};

}  // namespace kvfold

#endif
