// Rows of attention, kWidth of them side by side, and what is done with tables of them: entries looked up for keys, masses added
// and multiplied with codebooks for values (attend_step.h).
#pragma once

#include <type_traits>

#include "attend_parts.h"

namespace kvfold {

constexpr int64_t kLaneBlock = 8;  // codes whose tables are in the first-level cache together
constexpr int64_t kPlaces = 64;    // values whose masses' places are found ahead

// Keeps the compiler from rearranging an address into longer arithmetic.
inline char* opaque(char* address) {
  asm("" : "+r"(address));
  return address;
}

template <int kWidth>
struct WideOf;
template <>
struct WideOf<4> {
  typedef float Type __attribute__((vector_size(16)));
};
template <>
struct WideOf<8> {
  typedef float Type __attribute__((vector_size(32)));
};

template <int kWidth>
struct Rows {
  using Wide = typename WideOf<kWidth>::Type;

  static Wide get(const float* from) {
    Wide v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static void put(float* to, Wide v) { std::memcpy(to, &v, sizeof v); }

  // Rows [kWidth][lanes] side by side, [lanes][kWidth].
  template <int kCount>
  static void interleave(const vf (&rows)[kCount], float* to) {
    if constexpr (kCount == 1) {
      store(to, rows[0]);
    } else {
      vf low[kCount / 2], high[kCount / 2];
      for (int r = 0; r < kCount / 2; r++) {
        low[r] = zip<0>(rows[r], rows[r + kCount / 2]);
        high[r] = zip<1>(rows[r], rows[r + kCount / 2]);
      }
      interleave(low, to);
      interleave(high, to + kCount / 2 * lanes);
    }
  }

  // tables [codes][C][kWidth] from `query [kWidth][dim]`, channels in coded order.
  static void make_tables(const Books& books, const int32_t* book, const float* query, float* tables) {
    const int64_t dim = books.dim, padded = books.padded_size(), head_dim = books.head_dim();
    for (int64_t l = 0; l < books.codes(); l++) {
      const float* columns = books.columns(book[l]);
      const float* part = query + l % books.groups * dim;
      constexpr int kBunch = kWidth == 4 ? 4 : 2;  // lane vectors of codewords at a time; the columns are padded to many
      for (int64_t first = 0; first < books.size; first += kBunch * lanes) {
        vf acc[kBunch][kWidth];
        for (auto& bunch : acc)
          for (vf& a : bunch) a = vf{};
        for (int64_t j = 0; j < dim; j++) {
          vf column[kBunch];
          for (int w = 0; w < kBunch; w++) column[w] = hold(load(columns + j * padded + first + w * lanes));
          for (int r = 0; r < kWidth; r++) {
            const vf entry = splat(part[r * head_dim + j]);
            for (int w = 0; w < kBunch; w++) acc[w][r] += entry * column[w];
          }
        }
        for (int w = 0; w < kBunch; w++) {
          const int64_t c = first + w * lanes;
          put_table(acc[w], books.size - c, tables + (l * books.size + c) * kWidth);
        }
      }
    }
  }

  // Entries of one lane vector of codewords, of which `count` are there, row beside row.
  static void put_table(const vf (&acc)[kWidth], int64_t count, float* table) {
    if (count >= lanes) return interleave(acc, table);
    for (int64_t i = 0; i < std::min<int64_t>(lanes, count); i++)
      for (int r = 0; r < kWidth; r++) table[i * kWidth + r] = acc[r][i];
  }

  // Codes in blocks of kLaneBlock, and what is left in smaller ones: `of(first, count)` with the count as a constant.
  template <class Of>
  [[gnu::always_inline]] static inline void in_blocks(int64_t codes, const Of& of) {
    static_assert(kLaneBlock == 8);
    int64_t first = 0;
    for (; first + 8 <= codes; first += 8) of(first, std::integral_constant<int64_t, 8>());
    if (codes - first >= 4) of(first, std::integral_constant<int64_t, 4>()), first += 4;
    if (codes - first >= 2) of(first, std::integral_constant<int64_t, 2>()), first += 2;
    if (codes - first >= 1) of(first, std::integral_constant<int64_t, 1>());
  }

  // scores [count][kWidth] of keys whose codes have `stride`; kSize codewords a table, 0 for `size` of them.
  template <int64_t kSize, class Code>
  static void look_up(const Code* codes, int64_t stride, int64_t count, int64_t codes_of, int64_t size, const float* tables,
                      float* scores) {
    const int64_t table_size = (kSize ? kSize : size) * kWidth;
    std::fill_n(scores, count * kWidth, 0.0f);
    in_blocks(codes_of, [=](int64_t first, auto block) __attribute__((always_inline)) {
      constexpr int64_t kBlock = decltype(block)::value;
      const float* table = tables + first * table_size;
      const Code* code = codes + first;
      for (float* score = scores; score < scores + count * kWidth; score += kWidth, code += stride) {
        Wide sums[2] = {get(score), Wide{}};
#pragma GCC unroll 8
        for (int64_t l = 0; l < kBlock; l++) sums[l % 2] += get(table + code[l] * kWidth + l * table_size);
        put(score, sums[0] + sums[1]);
      }
    });
  }

  // mass [codes][size][kWidth] of the `count` values at `kept`, or, without, of the first. Bound by one store a cycle, so little else
  // may be issued: codes of bytes are put apart four by an instruction where the CPU has one, else where codewords lie is found ahead.
  template <int64_t kSize, class Code>
  static void add_mass(const Code* codes, int64_t stride, const int32_t* kept, int64_t count, int64_t codes_of, int64_t size,
                       const float* weights, float* mass, Ahead next) {
    const int64_t table_size = (kSize ? kSize : size) * kWidth;
    in_blocks(codes_of, [&](int64_t first, auto block) __attribute__((always_inline)) {
      constexpr int64_t kBlock = decltype(block)::value;
      char* const own = opaque(reinterpret_cast<char*>(mass + first * table_size));
      for (int64_t t = 0; t < count; t += kPlaces) {
        const int64_t some = std::min(kPlaces, count - t);
        next.ask();
        const float* weight = weights + t * kWidth;
        if (kept) {
          add_some<kBlock>([=](int64_t i) { return codes + kept[t + i] * stride + first; }, some, weight, table_size, own);
        } else {
          const Code* row = codes + t * stride + first;
          add_some<kBlock>([=](int64_t i) { return row + i * stride; }, some, weight, table_size, own);
        }
      }
    });
  }

  // sums [kWidth][head dim] (coded order) of the codewords, each times its mass. Four rows at a time, also where fewer are
  // asked for: their additions hide each other's latency, and a codeword is read once.
  static void mix(const Books& books, const int32_t* book, const float* mass, int64_t rows, float* sums) {
    std::fill_n(sums, kWidth * books.head_dim(), 0.0f);
    const uint16_t* halves = lanes > 4 ? books.halves() : nullptr;  // plain C++ takes longer to widen them
    for (int64_t l = 0; l < books.codes(); l++) {
      const float* own = mass + l * books.size * kWidth;
      for (int64_t r = 0; r < rows; r += 4) {
        float* to = sums + r * books.head_dim() + l % books.groups * books.dim;
        if (halves)
          add_scaled(own + r, halves + book[l] * books.size * books.dim, books, to);
        else
          add_scaled(own + r, books.table(book[l]), books, to);
      }
    }
  }

 private:
  // `some` weights to the masses of kBlock codes each, in tables from `own` on.
  template <int64_t kBlock, class Row>
  [[gnu::always_inline]] static inline void add_some(const Row& row, int64_t some, const float* weights, int64_t table_size, char* own) {
    using Code = std::decay_t<decltype(*row(0))>;
    const auto add = [=](int64_t l, int64_t place, Wide weight) __attribute__((always_inline)) {
      // Found once, with an addition that is not the slow one of three terms.
      float* sums = reinterpret_cast<float*>(opaque(own + place) + l * table_size * sizeof(float));
      put(sums, get(sums) + weight);
    };
#if defined(__BMI2__)
    if constexpr (sizeof(Code) == 1) {
      constexpr int64_t kFour = std::min<int64_t>(4, kBlock);
      constexpr uint64_t kSpread = 0x00ff00ff00ff00ff * sizeof(Wide);  // places in bytes, 16 bits each
      for (int64_t i = 0; i < some; i++, weights += kWidth) {
        const Code* code = row(i);
        const Wide weight = get(weights);
#pragma GCC unroll 2
        for (int64_t l = 0; l < kBlock; l += kFour) {
          uint32_t four = 0;
          std::memcpy(&four, code + l, kFour);
          uint64_t places = _pdep_u64(four, kSpread);
#pragma GCC unroll 4
          for (int64_t k = 0; k < kFour; k++, places >>= 16) add(l + k, static_cast<uint16_t>(places), weight);
        }
      }
      return;
    }
#endif
    using Place = std::conditional_t<sizeof(Code) == 1, uint16_t, uint32_t>;
    alignas(64) Place place[kPlaces * kBlock];
    for (int64_t i = 0; i < some; i++) {
      Code code[kBlock];
      std::memcpy(code, row(i), sizeof code);
      for (int64_t l = 0; l < kBlock; l++) place[i * kBlock + l] = static_cast<Place>(code[l] * sizeof(Wide));
    }
    for (int64_t i = 0; i < some; i++, weights += kWidth) {
      const Wide weight = get(weights);
#pragma GCC unroll 8
      for (int64_t l = 0; l < kBlock; l++) add(l, place[i * kBlock + l], weight);
    }
  }

  static constexpr int kTogether = 4;

  static vf entries(const float* from) { return load(from); }
  static vf entries(const uint16_t* from) { return load_halves(from); }
  static float entry(float x) { return x; }
  static float entry(uint16_t bits) { return half_to_float(bits); }

  template <class Entry>
  static void add_scaled(const float* mass, const Entry* table, const Books& books, float* sums) {
    const int64_t dim = books.dim, head_dim = books.head_dim();
    int64_t j = 0;
    for (; j + 2 * lanes <= dim; j += 2 * lanes) {
      vf acc[kTogether][2];
      for (int r = 0; r < kTogether; r++)
        for (int w = 0; w < 2; w++) acc[r][w] = load(sums + r * head_dim + j + w * lanes);
      for (int64_t c = 0; c < books.size; c++) {
        const vf low = entries(table + c * dim + j), high = entries(table + c * dim + j + lanes);
        for (int r = 0; r < kTogether; r++) {
          acc[r][0] += mass[c * kWidth + r] * low;
          acc[r][1] += mass[c * kWidth + r] * high;
        }
      }
      for (int r = 0; r < kTogether; r++)
        for (int w = 0; w < 2; w++) store(sums + r * head_dim + j + w * lanes, acc[r][w]);
    }
    for (; j < dim; j++)
      for (int r = 0; r < kTogether; r++)
        for (int64_t c = 0; c < books.size; c++) sums[r * head_dim + j] += mass[c * kWidth + r] * entry(table[c * dim + j]);
  }
};

}  // namespace kvfold
