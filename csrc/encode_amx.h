// The search of encode.cpp with the scores from the CPU's matrix unit (AMX, bfloat16), where it has one.
//
// Rounding both to bfloat16 leaves scores an error of less than 2^-8 of the two lengths' product. Every codeword that this error
// could place among the best, one or two more than are wanted, is scored anew in float32: the codes are those of a search in
// float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "lanes.h"

#include "amx.h"

#if defined(__AMX_BF16__)

namespace kvfold {

class AmxEncoder {
 public:
  static constexpr int64_t kRowsOfTile = 16;

  static bool serves(const EncodeCall& call) { return call.beam <= kRowsOfTile; }

  AmxEncoder(const Books& books, int64_t beam)
      : books_(books),
        tiles_(books.tiles()),
        beam_(beam),
        dim_(tiles_.parts * 32),
        stride_(1),
        errors_(kRowsOfTile * books.padded_size()) {
    while (stride_ < beam) stride_ *= 2;
  }

  // Codes [count][stages] of vectors [count][dim] whose stage s uses codebook `book[s]`.
  void encode(const float* x, int64_t count, const std::vector<int64_t>& book, int32_t* codes) {
    const int64_t depth = static_cast<int64_t>(book.size());
    for (auto& residual : residual_) residual.assign(count * stride_ * dim_, 0.0f);
    steps_.resize(depth * count * stride_);
    rounded_.assign((count + kRowsOfTile) * stride_ * dim_, 0);  // with room for a last tile that is not full
    for (int64_t i = 0; i < count; i++) {
      std::copy_n(x + i * books_.dim, books_.dim, &residual_[0][i * stride_ * dim_]);
      round(&residual_[0][i * stride_ * dim_], i * stride_);
    }
    const AmxTiles tiles;
    int64_t width = 1;
    for (int64_t s = 0; s < depth; s++) {
      const int64_t room = width == 1 ? 1 : stride_;  // rows of a tile that a vector takes
      const int64_t vectors = kRowsOfTile / room;
      const int64_t wider = s + 1 == depth ? 1 : std::min(beam_, width * books_.size);  // of the last stage the best alone counts
      for (int64_t first = 0; first < count; first += vectors) {
        const int64_t of = std::min(vectors, count - first);
        score(book[s], first * stride_, room);
        for (int64_t v = 0; v < of; v++)
          advance(book[s], s % 2, first + v, v * room, width, wider, s + 1 == depth, &steps_[(s * count + first + v) * stride_]);
      }
      width = wider;
    }
    for (int64_t i = 0; i < count; i++)
      for (int64_t s = depth - 1, place = 0; s >= 0; s--) {
        const Step& step = steps_[(s * count + i) * stride_ + place];
        codes[i * depth + s] = step.code;
        place = step.parent;
      }
  }

 private:
  struct Step {  // what made a partial code of the one before it
    int32_t parent, code;
  };

  // A residual, negated, as a bfloat16 row. Long before it is read: the unit waits for what was just written.
  void round(const float* residual, int64_t row) {
    for (int64_t j = 0; j < dim_; j += 16) {
      const __m512i nearest = nearest_bfloat16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(residual + j)));
      const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(&rounded_[row * dim_ + j]), halves);
    }
  }

  // errors_[row][codeword] = ||C||^2 / 2 - r . C, nearly, of 16 partial codes: those from `first` on, or the first ones of 16
  // vectors if each takes one row.
  void score(int64_t m, int64_t first, int64_t room) {
    const int64_t padded = books_.padded_size(), parts = tiles_.parts;
    const int64_t row_bytes = dim_ * 2 * (room == 1 ? stride_ : 1);
    const uint16_t* rows = &rounded_[first * dim_];
    const float* half_norms = books_.half_norms.data() + m * padded;  // a row for all: sums start with it
    const uint16_t* tile = tiles_.halves.data() + m * padded / 16 * parts * 512;
    if (parts == 1) {
      _tile_loadd(4, rows, row_bytes);
      for (int64_t c = 0; c < padded; c += 64, tile += 2048) {  // `padded` is a multiple of 64
        _tile_loadd(0, half_norms + c, 0);
        _tile_loadd(5, tile, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(1, half_norms + c + 16, 0);
        _tile_loadd(6, tile + 512, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(2, half_norms + c + 32, 0);
        _tile_loadd(5, tile + 1024, 64);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(3, half_norms + c + 48, 0);
        _tile_loadd(6, tile + 1536, 64);
        _tile_dpbf16ps(3, 4, 6);
        _tile_stored(0, &errors_[c], padded * 4);
        _tile_stored(1, &errors_[c + 16], padded * 4);
        _tile_stored(2, &errors_[c + 32], padded * 4);
        _tile_stored(3, &errors_[c + 48], padded * 4);
      }
    } else {
      for (int64_t c = 0; c < padded; c += 16) {
        _tile_loadd(0, half_norms + c, 0);
        for (int64_t part = 0; part < parts; part++, tile += 512) {
          _tile_loadd(5, tile, 64);
          _tile_loadd(4, rows + part * 32, row_bytes);
          _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, &errors_[c], padded * 4);
      }
    }
  }

  // The best `wider` continuations of one vector's `width` partial codes, whose scores start at `row`, into `best`, ascending, and
  // their residuals to the other side.
  void advance(int64_t m, int64_t side, int64_t vector, int64_t row, int64_t width, int64_t wider, bool last, Step* best) {
    const int64_t padded = books_.padded_size(), dim = books_.dim;
    const float infinity = std::numeric_limits<float>::infinity();
    const float* half_norms = books_.half_norms.data() + m * padded;
    const float* residual = &residual_[side][vector * stride_ * dim_];
    float half_square[kRowsOfTile], longest = 0;
    __m512 lowest[4];
    for (auto& low : lowest) low = _mm512_set1_ps(infinity);
    for (int64_t r = 0; r < width; r++) {
      half_square[r] = 0.5f * dot(residual + r * dim_, residual + r * dim_, dim_);
      longest = std::max(longest, 2 * half_square[r]);
      const __m512 half = _mm512_set1_ps(half_square[r]);
      const float* errors = &errors_[(row + r) * padded];
      for (int64_t c = 0; c < padded; c += 64)
        for (int k = 0; k < 4; k++)
          lowest[k] = _mm512_min_ps(lowest[k], _mm512_add_ps(half, _mm512_loadu_ps(errors + c + 16 * k)));
    }
    // Half errors from here on. `wider` candidates do not exceed `limit`, and either of two errors may be off by half the slack.
    const float slack = std::sqrt(longest) * tiles_.longest[m] * (2.05f / 256) + longest * 1e-6f + 1e-30f;
    const float limit = low_limit(lowest, wider) + slack;
    float best_error[kRowsOfTile];
    int64_t filled = 0;
    float reach = limit;
    for (int64_t r = 0; r < width; r++)
      for (int64_t c = 0; c < padded; c += 64) {
        const float* errors = &errors_[(row + r) * padded + c];
        const __m512 bound = _mm512_set1_ps(reach - half_square[r]);
        uint64_t left = 0;
        for (int k = 0; k < 4; k++)
          left |= static_cast<uint64_t>(_mm512_cmp_ps_mask(_mm512_loadu_ps(errors + 16 * k), bound, _CMP_LE_OQ)) << (16 * k);
        for (; left; left &= left - 1) {
          const int64_t code = c + __builtin_ctzll(left);
          if (code >= books_.size) break;
          const float product = dot(residual + r * dim_, books_.table(m) + code * dim, dim);
          const float error = half_square[r] + (half_norms[code] - product);
          if (filled == wider && error >= best_error[wider - 1]) continue;
          int64_t at = filled < wider ? filled++ : wider - 1;
          for (; at > 0 && best_error[at - 1] > error; at--) {
            best_error[at] = best_error[at - 1];
            best[at] = best[at - 1];
          }
          best_error[at] = error;
          best[at] = {static_cast<int32_t>(r), static_cast<int32_t>(code)};
          if (filled == wider) reach = std::min(reach, best_error[wider - 1] + slack);
        }
      }
    if (last) return;
    float* next = &residual_[1 - side][vector * stride_ * dim_];
    for (int64_t i = 0; i < filled; i++) {
      const float* from = residual + best[i].parent * dim_;
      const float* codeword = books_.table(m) + best[i].code * dim;
      for (int64_t j = 0; j < dim; j += 16) {
        const __mmask16 there = part_mask(dim - j);
        const __m512 rest = _mm512_sub_ps(_mm512_loadu_ps(from + j), _mm512_maskz_loadu_ps(there, codeword + j));
        _mm512_storeu_ps(next + i * dim_ + j, rest);
      }
      round(next + i * dim_, vector * stride_ + i);
    }
  }

  static __mmask16 part_mask(int64_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

  // An error that at least `count` candidates do not exceed, from the lowest of 64 sets of them; infinity if there is none.
  static float low_limit(__m512 (&lowest)[4], int64_t count) {
    const auto least = [&] { return _mm512_min_ps(_mm512_min_ps(lowest[0], lowest[1]), _mm512_min_ps(lowest[2], lowest[3])); };
    const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    if (count <= 4) {  // 16 sets tell nearly as much, sooner
      __m512 sets = least();
      for (int64_t i = 1; i < count; i++) {
        const __m512 low = _mm512_set1_ps(_mm512_reduce_min_ps(sets));
        sets = _mm512_mask_mov_ps(sets, _mm512_cmp_ps_mask(sets, low, _CMP_LE_OQ), infinity);
      }
      return _mm512_reduce_min_ps(sets);
    }
    for (int64_t i = 1; i < count; i++) {
      const __m512 low = _mm512_set1_ps(_mm512_reduce_min_ps(least()));
      for (__m512& sets : lowest) sets = _mm512_mask_mov_ps(sets, _mm512_cmp_ps_mask(sets, low, _CMP_LE_OQ), infinity);
    }
    return _mm512_reduce_min_ps(least());
  }

  static float dot(const float* a, const float* b, int64_t dim) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < dim; j += 16) {
      const __mmask16 there = part_mask(dim - j);
      sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, a + j), _mm512_maskz_loadu_ps(there, b + j), sum);
    }
    return _mm512_reduce_add_ps(sum);
  }

  const Books& books_;
  const Books::Tiles& tiles_;
  int64_t beam_, dim_, stride_;  // dim_: padded to whole tiles with zeros; stride_: partial codes a vector has room for
  Aligned<float> errors_;
  Aligned<uint16_t> rounded_;        // [vectors][stride_][dim_], negated residuals
  Aligned<float> residual_[2];       // [vectors][stride_][dim_], read at even and at odd stages
  std::vector<Step> steps_;          // [stages][vectors][stride_]
};

}  // namespace kvfold

#endif
