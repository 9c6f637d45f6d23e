// Tables of the keys' codes, table[l][c] = q . codeword c of code l, for every item of batch, KV head and set of rows: integers
// looked up in registers where the CPU can and they are exact enough (attend_bytes.h), else float32 (attend_rows.h).
#pragma once

#include "attend_bytes.h"
#include "attend_rows.h"

namespace kvfold {

constexpr float kByteError = 4e-4f;  // of a score from tables of 16-bit integers, expected; about that of an output

// Tables of 256 codewords from products of 16-bit integers, two multiply-adds where float32 has one: codewords have a step a
// codebook, every row's part in a group one of its own.
template <int kWidth>
struct IntegerProducts {
  std::vector<float> low, high;  // of every table, [kWidth][codes]
  float error[kWidth] = {};      // of every row's scores, expected (root mean square)
  bool made = false;             // not from queries that are not finite, nor if `error` alone is too much

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
  // tables [kWidth][codes][256] from query [kWidth][head dim], channels in coded order; an error of `most` may be made.
  IntegerProducts(const Books& books, const int32_t* book, const float* query, float most, float* tables)
      : low(kWidth * books.codes()), high(low.size()) {
    const Books::Pairs& whole = books.pairs();
    const int64_t dim = books.dim, codes = books.codes();
    std::vector<int16_t> integers(books.groups * whole.pairs * kWidth * 2, 0);  // [P][pairs][kWidth][2]
    std::vector<float> unit(kWidth * books.groups);
    for (int r = 0; r < kWidth; r++) {
      double square_of_error = 0;
      for (int64_t p = 0; p < books.groups; p++) {
        const float* part = query + r * books.head_dim() + p * dim;
        double square = 0;
        float largest = 0;
        for (int64_t j = 0; j < dim; j++) {
          square += static_cast<double>(part[j]) * part[j];
          largest = std::max(largest, std::fabs(part[j]));
        }
        if (!(square < std::numeric_limits<float>::infinity())) return;
        // No sum of products, at most |part| |codeword|, leaves 32 bits.
        const double most = 2.1e9 / (whole.longest * std::sqrt(square) + 1e-30);
        const double scale = largest > 1e-30f ? std::min(32767.0 / largest, most) : 0.0;
        unit[r * books.groups + p] = scale > 0 ? static_cast<float>(1 / scale) : 0.0f;
        for (int64_t j = 0; j < dim; j++)
          integers[((p * whole.pairs + j / 2) * kWidth + r) * 2 + j % 2] = static_cast<int16_t>(std::lrint(part[j] * scale));
        // An integer is off by up to a half, evenly so, times the numbers that it is multiplied with.
        for (int64_t l = p; l < codes; l += books.groups) {
          const double step = whole.step[book[l]], rounded = unit[r * books.groups + p] * whole.longest;
          square_of_error += step * step * (square + rounded * rounded) / 12;
        }
      }
      error[r] = static_cast<float>(std::sqrt(square_of_error));
    }
    if (*std::max_element(error, error + kWidth) > most) return;
    made = true;
    for (int64_t l = 0; l < codes; l++) {
      const int64_t p = l % books.groups;
      const int16_t* columns = whole.values.data() + book[l] * whole.pairs * kByteSize * 2;
      float by[kWidth];
      for (int r = 0; r < kWidth; r++) by[r] = unit[r * books.groups + p] * whole.step[book[l]];
      multiply(columns, integers.data() + p * whole.pairs * kWidth * 2, whole.pairs, by, codes, l, tables + l * kByteSize);
    }
  }

 private:
  // Of one code. `query [pairs][kWidth][2]`.
  void multiply(const int16_t* columns, const int16_t* query, int64_t pairs, const float (&by)[kWidth], int64_t codes, int64_t l,
                float* tables) {
    constexpr int kBunch = kWidth == 4 ? 4 : 2;  // lane vectors of codewords at a time
    vf least[kWidth], most[kWidth];
    for (int r = 0; r < kWidth; r++) {
      least[r] = splat(std::numeric_limits<float>::infinity());
      most[r] = -least[r];
    }
    for (int64_t first = 0; first < kByteSize; first += kBunch * lanes) {
      __m512i acc[kBunch][kWidth];
      for (auto& bunch : acc)
        for (__m512i& a : bunch) a = _mm512_setzero_si512();
      for (int64_t j = 0; j < pairs; j++) {
        __m512i column[kBunch];
        for (int w = 0; w < kBunch; w++) column[w] = _mm512_load_si512(columns + (j * kByteSize + first + w * lanes) * 2);
        for (int r = 0; r < kWidth; r++) {
          int32_t pair;
          std::memcpy(&pair, query + (j * kWidth + r) * 2, sizeof pair);
          const __m512i entries = _mm512_set1_epi32(pair);
          for (int w = 0; w < kBunch; w++) add_products(acc[w][r], column[w], entries);
        }
      }
      for (int r = 0; r < kWidth; r++)
        for (int w = 0; w < kBunch; w++) {
          const vf entry = (vf)_mm512_cvtepi32_ps(acc[w][r]) * by[r];
          least[r] = entry < least[r] ? entry : least[r];
          most[r] = larger(most[r], entry);
          store(tables + r * codes * kByteSize + first + w * lanes, entry);
        }
    }
    for (int r = 0; r < kWidth; r++) {
      low[r * codes + l] = _mm512_reduce_min_ps((__m512)least[r]);
      high[r * codes + l] = _mm512_reduce_max_ps((__m512)most[r]);
    }
  }
#else
  IntegerProducts(const Books&, const int32_t*, const float*, float, float*) {}
#endif
};

template <int kWidth>
class KeyTables {
 public:
  KeyTables(const AttendCall& call, int64_t sets)
      : call_(call),
        books_(*call.key.books),
        sets_(sets),
        size_(books_.codes() * books_.size * kWidth),
        bytes_(call.key.bits == 8 && books_.size == kByteSize),
        registers_(bytes_ && has_byte_tables()),
        tables_(call.batch * call.kv_heads * sets * size_),
        by_row_(registers_ ? call.batch * call.kv_heads * sets * kWidth : 0) {}

  void make(int64_t item) {
    const int64_t all = call_.shared * call_.queries, dim = call_.key.dim, pair = item / sets_, first = item % sets_ * kWidth;
    const int64_t rows = std::min<int64_t>(kWidth, all - first), b = pair / call_.kv_heads, g = pair % call_.kv_heads;
    std::vector<float> query(kWidth * dim);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < dim; i++)
        query[r * dim + i] = call_.query[(pair * all + first + r) * dim + books_.channels[i]] * call_.softmax_scale;
    const int32_t* book = books_.book.data() + (call_.key.head + g) * books_.codes();
    float* own = tables_.data() + item * size_;
    if (registers_) {
      const int64_t codes = books_.codes();
      Aligned<float> exact(size_);
      const float most = kByteError / std::max(largest_scale(call_.key, b, g, call_.tokens), 1e-30f);
      const IntegerProducts<kWidth> products(books_, book, query.data(), most, exact.data());
      float error = products.made ? 0 : std::numeric_limits<float>::infinity();
      for (int64_t r = 0; r < rows && products.made; r++) {
        ByteTables& tables = by_row_[item * kWidth + r];
        uint8_t* planes = reinterpret_cast<uint8_t*>(own) + r * ByteTables::bytes(codes);
        const float packed =
            tables.make(&exact[r * codes * kByteSize], &products.low[r * codes], &products.high[r * codes], codes, planes);
        error = std::max(error, std::hypot(products.error[r], packed));
      }
      if (error <= most) return;
      by_row_[item * kWidth].planes = nullptr;
    }
    Rows<kWidth>::make_tables(books_, book, query.data(), own);
  }

  // Scores (without the keys' scales) of `count` keys whose codes start at `row`, [count][kWidth].
  void look_up(int64_t item, int64_t rows, const uint8_t* row, int64_t count, float* scores, Ahead next) const {
    const int64_t codes = books_.codes(), stride = call_.key.token_stride;
    const float* own = tables_.data() + item * size_;
    if (registers_ && by_row_[item * kWidth].planes) {
      Aligned<uint8_t> turned(kByteBlock * codes);
      Aligned<float> found(kWidth * kByteBlock, 0.0f);
      for (int64_t t = 0; t < count; t += kByteBlock) {
        const int64_t some = std::min(kByteBlock, count - t);
        turn_codes(row + t * stride, stride, some, codes, turned.data());
        Ahead own(row + (t + some) * stride, stride, std::min(kByteBlock, count - t - some), rows);
        for (int64_t r = 0; r < rows; r++) {
          next.ask();
          own.ask();
          by_row_[item * kWidth + r].look_up(turned.data(), codes, some, &found[r * kByteBlock]);
        }
        for (int64_t i = 0; i < some; i += lanes) {
          vf scores_of[kWidth];
          for (int r = 0; r < kWidth; r++) scores_of[r] = load(&found[r * kByteBlock + i]);
          Rows<kWidth>::interleave(scores_of, scores + (t + i) * kWidth);
        }
      }
      return;
    }
    next.ask();
    if (bytes_) {
      Rows<kWidth>::template look_up<256>(row, stride, count, codes, books_.size, own, scores);
    } else {
      std::vector<uint16_t> unpacked(count * codes);
      unpack(call_.key, row, count, unpacked.data());
      Rows<kWidth>::template look_up<0>(unpacked.data(), codes, count, codes, books_.size, own, scores);
    }
  }

 private:
  const AttendCall& call_;
  const Books& books_;
  int64_t sets_, size_;
  bool bytes_, registers_;  // codes are whole bytes; and their tables are looked up in registers
  Aligned<float> tables_;
  std::vector<ByteTables> by_row_;
};

}  // namespace kvfold
