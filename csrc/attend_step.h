// Attention of a few queries (a decode step, a handful of speculative tokens) straight on the codes.
//
// Rows are the query heads that share a KV head, times the queries; their numbers lie side by side, kWidth of them, so that
// one load serves all:
//   keys     score of a key = sum over its codes l of table[l][code], table[l][c] = q . codeword
//   values   sum of the keys' weights by codeword first, mass[l][c] += weight, then one product with the codebooks
// Neither decodes a vector, and both are float32 throughout. Keys that must be rotated cannot use tables: they are added up
// as integers and rotated in registers where the CPU has the instructions (attend_rotated.h), else decoded.
#pragma once

#include <numeric>

#include "attend_rotated.h"
#include "attend_tiles.h"

namespace kvfold {

constexpr int64_t kStepBlock = 2048;  // keys whose scores are held at a time
constexpr int64_t kStepChunk = 16384;  // keys of a piece of work at most
constexpr int64_t kStepLeast = 1024;   // and at least, if there are so many
constexpr int64_t kStepPieces = 8;     // wanted
constexpr int64_t kLaneBlock = 8;      // codes whose tables are in the first-level cache together
constexpr float kRescale = 20;         // a maximum that rises by less needs no rescaling in float32
constexpr float kSkipShare = 0.1f;     // of the norm of the sum of all weights times the longest value, assumed of an output

template <class Code>
constexpr bool kPackedLoad = sizeof(Code) == 1 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

// Byte `l` of `eight` times a power of two, in two instructions.
template <int kFactor>
inline int64_t byte_times(uint64_t eight, int l) {
  constexpr int shift = __builtin_ctz(kFactor);
  const uint64_t moved = 8 * l < shift ? eight << (shift - 8 * l) : eight >> (8 * l - shift);
  return static_cast<int64_t>(moved & (uint64_t{255} << shift));
}

// Keeps the compiler from rearranging an address into longer arithmetic.
inline float* opaque(float* address) {
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
struct Step {
  using Wide = typename WideOf<kWidth>::Type;

  static Wide get(const float* from) {
    Wide v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static void put(float* to, Wide v) { std::memcpy(to, &v, sizeof v); }

  // tables [codes][C][kWidth] from `query [kWidth][dim]`, channels in coded order.
  static void make_tables(const Books& books, const int32_t* book, const float* query, float* tables) {
    const int64_t dim = books.dim, padded = books.padded_size(), head_dim = books.head_dim();
    for (int64_t l = 0; l < books.codes(); l++) {
      const float* columns = books.columns(book[l]);
      const float* part = query + l % books.groups * dim;
      float* table = tables + l * books.size * kWidth;
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
        for (int w = 0; w < kBunch; w++) put_table(acc[w], books.size - first - w * lanes, table + (first + w * lanes) * kWidth);
      }
    }
  }

  // Entries of one lane vector of codewords, of which `count` are there, row beside row.
  static void put_table(const vf (&acc)[kWidth], int64_t count, float* table) {
    if (kWidth == 4 && count >= lanes) {
      const vf a = zip<0>(acc[0], acc[2]), b = zip<0>(acc[1], acc[3]), c = zip<1>(acc[0], acc[2]), d = zip<1>(acc[1], acc[3]);
      store(table, zip<0>(a, b));
      store(table + lanes, zip<1>(a, b));
      store(table + 2 * lanes, zip<0>(c, d));
      store(table + 3 * lanes, zip<1>(c, d));
      return;
    }
    for (int64_t i = 0; i < std::min<int64_t>(lanes, count); i++)
      for (int r = 0; r < kWidth; r++) table[i * kWidth + r] = acc[r][i];
  }

  // scores [count][kWidth] of keys whose codes have `stride`; kSize codewords a table, 0 for `size` of them.
  template <int64_t kSize, class Code>
  static void look_up(const Code* codes, int64_t stride, int64_t count, int64_t codes_of, int64_t size, const float* tables,
                      float* scores) {
    const int64_t table_size = (kSize ? kSize : size) * kWidth;
    std::fill_n(scores, count * kWidth, 0.0f);
    int64_t first = 0;
    for (; first + kLaneBlock <= codes_of; first += kLaneBlock) {
      const float* table = tables + first * table_size;
      const Code* code = codes + first;
      for (float* score = scores; score < scores + count * kWidth; score += kWidth, code += stride) {
        Wide even = get(score), odd = Wide{};
#pragma GCC unroll 4
        for (int64_t l = 0; l < kLaneBlock; l += 2) {
          even += get(table + code[l] * kWidth + l * table_size);
          odd += get(table + code[l + 1] * kWidth + (l + 1) * table_size);
        }
        put(score, even + odd);
      }
    }
    for (; first < codes_of; first++)
      for (int64_t t = 0; t < count; t++)
        put(scores + t * kWidth, get(scores + t * kWidth) + get(tables + first * table_size + codes[t * stride + first] * kWidth));
  }

  // mass [codes][size][kWidth] of the `count` values at `kept`.
  template <int64_t kSize, class Code>
  static void add_mass(const Code* codes, int64_t stride, const int32_t* kept, int64_t count, int64_t codes_of, int64_t size,
                       const float* weights, float* mass) {
    const int64_t table_size = (kSize ? kSize : size) * kWidth;
    int64_t first = 0;
    for (; first + kLaneBlock <= codes_of; first += kLaneBlock) {
      float* own = opaque(mass + first * table_size);
      for (int64_t i = 0; i < count; i++) {
        const Code* code = codes + kept[i] * stride + first;
        const Wide weight = get(weights + i * kWidth);
        uint64_t eight = 0;  // loads are what bounds this: one for eight codes of a byte
        if constexpr (kPackedLoad<Code>) std::memcpy(&eight, code, 8);
#pragma GCC unroll 8
        for (int l = 0; l < kLaneBlock; l++) {
          const int64_t place = kPackedLoad<Code> ? byte_times<4 * kWidth>(eight, l) : code[l] * int64_t{4 * kWidth};
          float* sums = opaque(reinterpret_cast<float*>(reinterpret_cast<char*>(own) + place)) + l * table_size;
          put(sums, get(sums) + weight);
        }
      }
    }
    for (; first < codes_of; first++)
      for (int64_t i = 0; i < count; i++) {
        float* sum_of = mass + first * table_size + codes[kept[i] * stride + first] * kWidth;
        put(sum_of, get(sum_of) + get(weights + i * kWidth));
      }
  }

  // sums [rows][head dim] (coded order) of the codewords, each times its mass.
  static void mix(const Books& books, const int32_t* book, const float* mass, int64_t rows, float* sums) {
    const int64_t dim = books.dim, head_dim = books.head_dim();
    std::fill_n(sums, rows * head_dim, 0.0f);
    for (int64_t l = 0; l < books.codes(); l++) {
      const float* own = mass + l * books.size * kWidth;
      for (int64_t r = 0; r < rows; r += 4) {
        float* to = sums + r * head_dim + l % books.groups * dim;
        if (r + 4 <= rows)
          add_scaled<4>(own + r, books.table(book[l]), books.size, dim, head_dim, to);
        else
          for (int64_t k = r; k < rows; k++)
            add_scaled<1>(own + k, books.table(book[l]), books.size, dim, head_dim, to + (k - r) * head_dim);
      }
    }
  }

  template <int kRowsOf>
  static void add_scaled(const float* mass, const float* table, int64_t size, int64_t dim, int64_t head_dim, float* sums) {
    int64_t j = 0;
    for (; j + 2 * lanes <= dim; j += 2 * lanes) {
      vf acc[kRowsOf][2];
      for (int r = 0; r < kRowsOf; r++)
        for (int w = 0; w < 2; w++) acc[r][w] = load(sums + r * head_dim + j + w * lanes);
      for (int64_t c = 0; c < size; c++) {
        const vf low = load(table + c * dim + j), high = load(table + c * dim + j + lanes);
        for (int r = 0; r < kRowsOf; r++) {
          acc[r][0] += mass[c * kWidth + r] * low;
          acc[r][1] += mass[c * kWidth + r] * high;
        }
      }
      for (int r = 0; r < kRowsOf; r++)
        for (int w = 0; w < 2; w++) store(sums + r * head_dim + j + w * lanes, acc[r][w]);
    }
    for (; j < dim; j++)
      for (int r = 0; r < kRowsOf; r++)
        for (int64_t c = 0; c < size; c++) sums[r * head_dim + j] += mass[c * kWidth + r] * table[c * dim + j];
  }

  // Each number kWidth times. On the way, rows that are needed next are asked for, so that far memory is not waited for.
  static void spread(const float* numbers, int64_t count, float* wide, const uint8_t* next_row, int64_t stride) {
    for (int64_t t = 0; t < count; t++) {
      put(wide + t * kWidth, Wide{} + numbers[t]);
      __builtin_prefetch(next_row + t * stride, 0, 2);
    }
  }

  static void hide(const AttendCall& call, int64_t b, int64_t first_row, int64_t rows, int64_t first, int64_t count,
                   float* scores) {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t q = (first_row + r) % call.queries;
      const uint8_t* mask =
          call.mask + b * call.mask_batch_stride + q * call.mask_query_stride + first * call.mask_token_stride;
      for (int64_t t = 0; t < count; t++)
        if (!mask[t * call.mask_token_stride]) scores[t * kWidth + r] = kMinusInfinity;
    }
  }

  // A lane vector holds several keys, or a part of one: `kTurns` of them make a whole pattern of rows.
  static constexpr int kTurns = kWidth > lanes ? kWidth / lanes : 1;

  static Wide fold(const vf (&per_lane)[kTurns], float (*join_two)(float, float)) {
    Wide result = Wide{};
    for (int r = 0; r < kWidth; r++) result[r] = per_lane[r / lanes][r % lanes];
    for (int i = kWidth; i < lanes; i++) result[i % kWidth] = join_two(result[i % kWidth], per_lane[0][i]);
    return result;
  }

  static float add(float a, float b) { return a + b; }
  static float most(float a, float b) { return a > b ? a : b; }

  // Scores times the keys' scales, capped; returns each row's largest. The buffers have room for whole lane vectors.
  static Wide scale_scores(float* scores, const float* scales, int64_t count, float softcap) {
    for (int64_t i = count; i % 16; i++) scores[i] = kMinusInfinity;
    vf best[kTurns];
    for (vf& b : best) b = splat(kMinusInfinity);
    for (int64_t i = 0; i < count; i += kTurns * lanes)
      for (int k = 0; k < kTurns; k++) {
        const int64_t at = i + k * lanes;
        vf score = load(scores + at);
        const vi hidden = score == kMinusInfinity;  // a scale may be 0
        score *= load(scales + at);
        if (softcap != 0) score = capped(score, softcap);
        score = hidden ? splat(kMinusInfinity) : score;
        store(scores + at, score);
        best[k] = larger(best[k], score);
      }
    return fold(best, most);
  }

  static float fewest(float a, float b) { return a < b ? a : b; }

  // exp(score - reference) times the values' scales in place of scores; their sums by row, without and with the scales, and the
  // least of them.
  static void weigh(float* scores, const float* scales, int64_t count, Wide reference, Wide& sum_of, Wide& mass, Wide& least) {
    vf subtract[kTurns], sums[kTurns], masses[kTurns], lowest[kTurns];
    for (int k = 0; k < kTurns; k++) {
      for (int i = 0; i < lanes; i++) subtract[k][i] = reference[(k * lanes + i) % kWidth];
      sums[k] = masses[k] = vf{};
      lowest[k] = splat(std::numeric_limits<float>::infinity());
    }
    for (int64_t i = 0; i < count; i += kTurns * lanes)
      for (int k = 0; k < kTurns; k++) {
        const int64_t at = i + k * lanes;
        const vf weight = exp_of(load(scores + at) - subtract[k]);
        const vf scaled = weight * load(scales + at);
        sums[k] += weight;
        masses[k] += scaled;
        lowest[k] = scaled < lowest[k] ? scaled : lowest[k];
        store(scores + at, scaled);
      }
    sum_of = fold(sums, add);
    mass = fold(masses, add);
    least = fold(lowest, fewest);
  }

  // Those of `count` weights of which a row reaches `limit`, and their places; the others are added to `lost`.
  static int64_t keep(const float* weights, int64_t count, float limit, int32_t* places, float* kept, Wide& lost) {
    int64_t found = 0;
    for (int64_t t = 0; t < count; t++) {
      const Wide weight = get(weights + t * kWidth);
      const auto reaches = weight >= limit;
      int64_t any[kWidth / 2];
      std::memcpy(any, &reaches, sizeof any);
      int64_t alive = 0;
      for (int64_t word : any) alive |= word;
      put(kept + found * kWidth, weight);
      places[found] = static_cast<int32_t>(t);
      if (alive)
        found++;
      else
        lost += weight;
    }
    return found;
  }

  // False if skipping turned out to cost more than `skip` allows.
  static bool run(const AttendCall& call, const RotatedPlan& plan, float skip) {
    const Books &keys = *call.key.books, &values = *call.value.books;
    const int64_t all = call.shared * call.queries, pairs = call.batch * call.kv_heads, dim = call.key.dim;
    const int64_t sets = (all + kWidth - 1) / kWidth;  // of rows that go together
    // Enough pieces of work for a few threads also where there are few heads; their number must not depend on the threads.
    const int64_t parts = (kStepPieces + pairs * sets - 1) / (pairs * sets);
    const int64_t even = std::max<int64_t>(kStepLeast, ((call.tokens + parts - 1) / parts + 63) / 64 * 64);
    const int64_t chunk_size = std::min(kStepChunk, even), chunks = (call.tokens + chunk_size - 1) / chunk_size;
    const int64_t value_dim = call.value.dim, table_size = keys.codes() * keys.size * kWidth;
    const bool rotated = call.positions != nullptr;

    Aligned<float> tables(rotated ? 0 : pairs * sets * table_size);
    if (!rotated)
      parallel_for(call.threads, pairs * sets, [&](int64_t item) {
        const int64_t pair = item / sets, first = item % sets * kWidth, rows = std::min<int64_t>(kWidth, all - first);
        std::vector<float> query(kWidth * dim);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t i = 0; i < dim; i++)
            query[r * dim + i] = call.query[(pair * all + first + r) * dim + keys.channels[i]] * call.softmax_scale;
        make_tables(keys, keys.book.data() + pair % call.kv_heads * keys.codes(), query.data(),
                    tables.data() + item * table_size);
      });

    const int64_t items = pairs * sets * chunks;
    std::vector<float> sums(items * kWidth * value_dim), top(items * kWidth, kMinusInfinity), total(items * kWidth, 0.0f),
        skipped(items * kWidth, 0.0f);
    parallel_for(call.threads, items, [&](int64_t item) {
      const int64_t chunk = item % chunks, set = item / chunks % sets, pair = item / chunks / sets;
      const int64_t b = pair / call.kv_heads, g = pair % call.kv_heads;
      const int64_t first_row = set * kWidth, rows = std::min<int64_t>(kWidth, all - first_row);
      const int64_t begin = chunk * chunk_size, end = std::min(begin + chunk_size, call.tokens);
      const bool key_bytes = call.key.bits == 8 && keys.size == 256, value_bytes = call.value.bits == 8 && values.size == 256;
      Aligned<float> scores(kStepBlock * kWidth), mass(values.codes() * values.size * kWidth, 0.0f);
      Aligned<float> wide(kStepBlock * kWidth, 0.0f), weights(kStepBlock * kWidth);
      std::vector<float> scales(kStepBlock);
      std::vector<int32_t> kept(kStepBlock), everyone(kStepBlock);
      std::iota(everyone.begin(), everyone.end(), 0);
      std::vector<uint16_t> codes(std::max(key_bytes ? 0 : keys.codes(), value_bytes ? 0 : values.codes()) * kStepBlock);
      RotatedScores rotation(plan, call, b, g, first_row, rows);
      Wide reference = Wide{} + std::numeric_limits<float>::infinity(), sum_of = Wide{}, lost = Wide{};
      float mass_of_all = 0;  // of weights times the values' scales, the row with the least
      bool seen = false;
      for (int64_t first = begin; first < end; first += kStepBlock) {
        const int64_t count = std::min(kStepBlock, end - first);
        read_scales(call.key, b, g, first, count, scales.data());
        const uint8_t* row = code_row(call.key, b, g, first);
        if (rotated) {
          rotation.template scores<kWidth>(first, count, scores.data());
        } else {
          const float* table = tables.data() + (pair * sets + set) * table_size;
          if (key_bytes) {
            look_up<256>(row, call.key.token_stride, count, keys.codes(), keys.size, table, scores.data());
          } else {
            unpack(call.key, row, count, codes.data());
            look_up<0>(codes.data(), keys.codes(), count, keys.codes(), keys.size, table, scores.data());
          }
        }
        spread(scales.data(), count, wide.data(), code_row(call.value, b, g, first), call.value.token_stride);
        if (call.mask) hide(call, b, first_row, rows, first, count, scores.data());
        const Wide best = scale_scores(scores.data(), wide.data(), count * kWidth, call.softcap);
        for (int64_t r = 0; r < rows; r++) {
          if (best[r] == kMinusInfinity) continue;
          float& known = top[item * kWidth + r];
          if (known == kMinusInfinity) {
            known = reference[r] = best[r];
          } else if (best[r] > known + kRescale) {
            const float keep = std::exp(known - best[r]);
            for (int64_t i = r; i < values.codes() * values.size * kWidth; i += kWidth) mass[i] *= keep;
            sum_of[r] *= keep;
            lost[r] *= keep;
            known = reference[r] = best[r];
          }
          seen = true;
        }
        if (!seen) continue;
        read_scales(call.value, b, g, first, count, scales.data());
        spread(scales.data(), count, wide.data(), code_row(call.key, b, g, std::min(first + count, end - 1)),
               first + 2 * count <= end ? call.key.token_stride : 0);
        Wide block_sum, block_mass, block_least;
        weigh(scores.data(), wide.data(), count * kWidth, reference, block_sum, block_mass, block_least);
        sum_of += block_sum;
        int64_t count_kept = count;
        const float* chosen = scores.data();
        const int32_t* places = everyone.data();
        if (skip > 0) {
          // The sum of all that is skipped stays below skip * kSkipShare * (mass so far); `join` checks the real bound.
          float least_mass = block_mass[0], least_weight = block_least[0];
          for (int64_t r = 1; r < rows; r++) {
            least_mass = std::min<float>(least_mass, block_mass[r]);
            least_weight = std::min<float>(least_weight, block_least[r]);
          }
          mass_of_all += least_mass;
          const float limit = skip * kSkipShare * mass_of_all / static_cast<float>(end - begin);
          if (least_weight < limit) count_kept = keep(scores.data(), count, limit, kept.data(), weights.data(), lost);
          if (count_kept < count) {
            chosen = weights.data();
            places = kept.data();
          }
        }
        row = code_row(call.value, b, g, first);
        if (value_bytes) {
          add_mass<256>(row, call.value.token_stride, places, count_kept, values.codes(), values.size, chosen, mass.data());
        } else {
          unpack(call.value, row, count, codes.data());
          add_mass<0>(codes.data(), values.codes(), places, count_kept, values.codes(), values.size, chosen, mass.data());
        }
      }
      mix(values, values.book.data() + g * values.codes(), mass.data(), rows, sums.data() + item * kWidth * value_dim);
      for (int r = 0; r < kWidth; r++) {
        total[item * kWidth + r] = sum_of[r];
        skipped[item * kWidth + r] = lost[r] * values.longest[g];
      }
    });

    bool held = true;
    for (int64_t item = 0; item < pairs * sets; item++) {
      const int64_t pair = item / sets, first = item % sets * kWidth, rows = std::min<int64_t>(kWidth, all - first);
      std::vector<Part> parts;
      std::vector<const float*> lost;
      for (int64_t i = item * chunks; i < (item + 1) * chunks; i++) {
        parts.push_back({sums.data() + i * kWidth * value_dim, top.data() + i * kWidth, total.data() + i * kWidth});
        lost.push_back(skipped.data() + i * kWidth);
      }
      std::vector<float> out(rows * value_dim);
      held = held && join(parts, lost, skip, rows, value_dim, out.data(), call.lse + pair * all + first);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < value_dim; i++)
          call.out[(pair * all + first + r) * value_dim + values.channels[i]] = out[r * value_dim + i];
    }
    return held;
  }
};

constexpr int64_t kStepRows = 16;         // more rows are worth decoding for
constexpr int64_t kStepKeys = 256;        // fewer keys are not worth making tables for
constexpr int64_t kStepCodewords = 4096;  // the mass of more does not fit a cache

// Attends and returns true, or returns false for a call that tiles serve better.
inline bool attend_step(const AttendCall& call) {
  if (call.center || !call.key.books || !call.value.books || call.shared * call.queries > kStepRows || call.tokens < kStepKeys ||
      call.value.books->size > kStepCodewords)
    return false;
  const RotatedPlan plan(call);
  if (call.positions ? !plan.possible : call.key.books->size > kStepCodewords) return false;
  const bool narrow = call.shared * call.queries <= 4;
  const auto run = narrow ? Step<4>::run : Step<8>::run;
  if (!run(call, plan, call.skip) && !run(call, plan, 0)) throw std::logic_error("skipping nothing lost something");
  return true;
}

}  // namespace kvfold
