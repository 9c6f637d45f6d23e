// Attention of a few queries (a decode step, a handful of speculative tokens) straight on the codes.
//
// Rows are the query heads that share a KV head, times the queries; their numbers lie side by side, kWidth of them, so that
// one load serves all:
//   keys     score of a key = sum over its codes l of table[l][code], table[l][c] = q . codeword
//   values   sum of the keys' weights by codeword first, mass[l][c] += weight, then one product with the codebooks
// Neither decodes a vector. Masses are float32; tables too, unless they are looked up in registers (attend_bytes.h). Keys that
// must be rotated cannot use tables: they are added up as integers and rotated in registers where the CPU has the instructions
// (attend_rotated.h), else decoded.
#pragma once

#include <optional>

#include "attend_center.h"
#include "attend_mix.h"
#include "attend_rotated.h"
#include "attend_rows.h"
#include "attend_seen.h"
#include "attend_tables.h"
#include "attend_tiles.h"

namespace kvfold {

constexpr int64_t kStepBlock = 4096;   // keys whose scores are held at a time: masses come from the second-level cache once a block
constexpr int64_t kStepChunk = 16384;  // keys of a piece of work at most
constexpr int64_t kStepLeast = 1024;   // and at least, if there are so many
constexpr float kRescale = 20;         // a maximum that rises by less needs no rescaling in float32
constexpr float kSkipShare = 0.1f;     // of the norm of the sum of all weights times the longest value, assumed of an output

template <int kWidth>
struct Step : Rows<kWidth> {
  using Base = Rows<kWidth>;
  using typename Base::Wide;
  using Base::get, Base::mix, Base::put;

  // A number a key, kWidth times each.
  static void spread(vf numbers, vf (&wide)[kWidth]) {
    wide[0] = numbers;
    for (int have = 1; have < kWidth; have *= 2)
      for (int i = have; i-- > 0;) {
        const vf some = wide[i];
        wide[2 * i] = zip<0>(some, some);
        wide[2 * i + 1] = zip<1>(some, some);
      }
  }

  static void hide(const AttendCall& call, int64_t b, int64_t first_row, int64_t rows, int64_t first, int64_t count,
                   float* scores) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t t = 0; t < count; t += kSeen) {
        uint64_t hidden = keys_hidden(call, b, (first_row + r) % call.queries, first + t, std::min(kSeen, count - t));
        for (; hidden; hidden &= hidden - 1) scores[(t + __builtin_ctzll(hidden)) * kWidth + r] = kMinusInfinity;
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

  // Scores of `count` keys times the keys' scales, capped; returns each row's largest. The buffers have room for whole lane vectors.
  static Wide scale_scores(float* scores, float* scales, int64_t count, float softcap) {
    for (int64_t t = count; t % lanes; t++) {
      scales[t] = 0;
      for (int64_t r = 0; r < kWidth; r++) scores[t * kWidth + r] = kMinusInfinity;
    }
    vf best[kTurns];
    for (vf& b : best) b = splat(kMinusInfinity);
    for (int64_t t = 0; t < count; t += lanes) {
      vf wide[kWidth];
      spread(load(scales + t), wide);
      for (int k = 0; k < kWidth; k++) {
        float* at = scores + t * kWidth + k * lanes;
        vf score = load(at);
        const vi hidden = score == kMinusInfinity;  // a scale may be 0
        score *= wide[k];
        if (softcap != 0) score = capped(score, softcap);
        score = hidden ? splat(kMinusInfinity) : score;
        store(at, score);
        best[k % kTurns] = larger(best[k % kTurns], score);
      }
    }
    return fold(best, most);
  }

  static float fewest(float a, float b) { return a < b ? a : b; }

  // exp(score - reference) times the values' scales in place of scores of `count` keys; their sums by row, without and with the
  // scales, and the least of them. What follows the last key up to a whole lane vector was hidden by `scale_scores`.
  static void weigh(float* scores, float* scales, int64_t count, Wide reference, Wide& sum_of, Wide& mass, Wide& least) {
    for (int64_t t = count; t % lanes; t++) scales[t] = 0;
    vf subtract[kTurns], sums[kTurns], masses[kTurns], lowest[kTurns];
    for (int k = 0; k < kTurns; k++) {
      for (int i = 0; i < lanes; i++) subtract[k][i] = reference[(k * lanes + i) % kWidth];
      sums[k] = masses[k] = vf{};
      lowest[k] = splat(std::numeric_limits<float>::infinity());
    }
    for (int64_t t = 0; t < count; t += lanes) {
      vf wide[kWidth];
      spread(load(scales + t), wide);
      for (int i = 0; i < kWidth; i++) {
        float* at = scores + t * kWidth + i * lanes;
        const int k = i % kTurns;
        const vf weight = exp_of(load(at) - subtract[k]);
        const vf scaled = weight * wide[i];
        sums[k] += weight;
        masses[k] += scaled;
        lowest[k] = scaled < lowest[k] ? scaled : lowest[k];
        store(at, scaled);
      }
    }
    sum_of = fold(sums, add);
    mass = fold(masses, add);
    least = fold(lowest, fewest);
  }

  // How many of `count` weights reach `limit`, of the row of which most do.
  static int64_t reaching(const float* weights, int64_t count, float limit) {
    vi found[kTurns] = {};
    for (int64_t t = 0; t < count; t += lanes)  // what follows the last key up to a whole lane vector is 0
      for (int i = 0; i < kWidth; i++) found[i % kTurns] -= load(weights + t * kWidth + i * lanes) >= limit;
    int64_t of_row[kWidth] = {};
    for (int k = 0; k < kTurns; k++)
      for (int i = 0; i < lanes; i++) of_row[(k * lanes + i) % kWidth] += found[k][i];
    return *std::max_element(of_row, of_row + kWidth);
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

  // What one piece of work needs.
  struct Workplace {
    Aligned<float> scores, weights, scales, mass;
    Aligned<int32_t> kept;
    Aligned<uint16_t> codes;
  };

  // False if skipping turned out to cost more than `skip` allows.
  static bool run(const AttendCall& call, const RotatedPlan& plan, float skip) {
    const Books& values = *call.value.books;
    const int64_t all = call.shared * call.queries, pairs = call.batch * call.kv_heads;
    const int64_t sets = (all + kWidth - 1) / kWidth;  // of rows that go together
    // Enough pieces of work for a few threads also where there are few heads: an even number, so that two or four share them out,
    // which must not depend on the threads.
    int64_t parts = 1;
    while (4 * pairs * sets * parts < 3 * call.pieces) parts *= 2;
    const int64_t even = std::max<int64_t>(kStepLeast, ((call.tokens + parts - 1) / parts + 63) / 64 * 64);
    const int64_t chunk_size = std::min(kStepChunk, even), chunks = (call.tokens + chunk_size - 1) / chunk_size;
    const int64_t value_dim = call.value.dim;
    const bool rotated = call.positions && !call.center;
    const auto center_table = call.center ? kept<CenterTable>(call) : nullptr;

    std::optional<KeyTables<kWidth>> tables;
    if (!rotated) tables.emplace(call, sets);
    const bool made_ahead = tables && chunks > 1;  // else there is one piece of work that needs them
    if (made_ahead) parallel_for(call.threads, pairs * sets, [&](int64_t item) { tables->make(item); });

    const int64_t items = pairs * sets * chunks;
    std::vector<float> sums(items * kWidth * value_dim), top(items * kWidth, kMinusInfinity), total(items * kWidth, 0.0f),
        skipped(items * kWidth, 0.0f);
    parallel_stretches(call.threads, items, [&](int64_t item) {
      const int64_t chunk = item % chunks, set = item / chunks % sets, pair = item / chunks / sets;
      const int64_t b = pair / call.kv_heads, g = pair % call.kv_heads;
      const int64_t first_row = set * kWidth, rows = std::min<int64_t>(kWidth, all - first_row);
      const int64_t begin = chunk * chunk_size, end = std::min(begin + chunk_size, call.tokens);
      const bool value_bytes = call.value.bits == 8 && values.size == 256;
      const int64_t block = std::min(kStepBlock, (end - begin + 15) / 16 * 16);  // whole lane vectors
      static thread_local Workplace place;  // asked for anew, memory comes page by page from the kernel: 30 microseconds a call
      auto& [scores, weights, scales, mass, kept, codes] = place;
      scores.resize(block * kWidth), weights.resize(block * kWidth), scales.resize(block), kept.resize(block);
      mass.assign(values.codes() * values.size * kWidth, 0.0f);
      codes.resize(value_bytes ? 0 : values.codes() * block);
      RotatedScores rotation(plan, call, b, g, first_row, rows);
      std::optional<CenterScores<kWidth>> center;
      if (call.center) center.emplace(*center_table, call, b, g, first_row, rows);
      if (tables && !made_ahead) tables->make(pair * sets + set);
      Wide reference = Wide{} + std::numeric_limits<float>::infinity(), sum_of = Wide{}, lost = Wide{};
      float mass_of_all = 0;  // of weights times the values' scales, the row with the least
      bool seen = false;
      for (int64_t first = begin; first < end; first += kStepBlock) {
        const int64_t count = std::min(kStepBlock, end - first);
        read_scales(call.key, b, g, first, count, scales.data());
        const auto codes_ahead = [&](const Side& side, int64_t from, int64_t times) {
          return Ahead(code_row(side, b, g, std::min(from, end)), side.token_stride, std::min(kStepBlock, end - from), times);
        };
        if (rotated) {
          const Ahead next = codes_ahead(call.value, first, count / kRotationTile);
          rotation.template scores<kWidth>(first, count, scores.data(), next);
        } else {
          const Ahead next = codes_ahead(call.value, first, count / kByteBlock * rows);
          tables->look_up(pair * sets + set, rows, code_row(call.key, b, g, first), count, scores.data(), next);
        }
        if (center) center->add(first, count, scores.data(), scales.data());
        if (!sees_all(call)) hide(call, b, first_row, rows, first, count, scores.data());
        const Wide best = scale_scores(scores.data(), scales.data(), count, call.softcap);
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
        Wide block_sum, block_mass, block_least;
        weigh(scores.data(), scales.data(), count, reference, block_sum, block_mass, block_least);
        sum_of += block_sum;
        int64_t count_kept = count;
        const float* chosen = scores.data();
        const int32_t* places = nullptr;
        if (skip > 0) {
          // The sum of all that is skipped stays below skip * kSkipShare * (mass so far); `join` checks the real bound.
          float least_mass = block_mass[0], least_weight = block_least[0];
          for (int64_t r = 1; r < rows; r++) {
            least_mass = std::min<float>(least_mass, block_mass[r]);
            least_weight = std::min<float>(least_weight, block_least[r]);
          }
          mass_of_all += least_mass;
          const float limit = skip * kSkipShare * mass_of_all / static_cast<float>(end - begin);
          const bool pays = least_weight < limit && 8 * reaching(scores.data(), count, limit) < 7 * count;  // else few are skipped
          if (pays) count_kept = keep(scores.data(), count, limit, kept.data(), weights.data(), lost);
          if (count_kept < count) {
            chosen = weights.data();
            places = kept.data();
          }
        }
        const uint8_t* row = code_row(call.value, b, g, first);
        const Ahead next = codes_ahead(call.key, first + count, count_kept / kPlaces * (values.codes() / kLaneBlock));
        if (value_bytes) {
          Base::template add_mass<256>(row, call.value.token_stride, places, count_kept, values.codes(), values.size, chosen, mass.data(), next);
        } else {
          unpack(call.value, row, count, codes.data());
          Base::template add_mass<0>(codes.data(), values.codes(), places, count_kept, values.codes(), values.size, chosen, mass.data(), next);
        }
      }
      const int32_t* book = values.book.data() + (call.value.head + g) * values.codes();
      float* own_sums = sums.data() + item * kWidth * value_dim;
      if (UnitMix<kWidth>::serves(values, book))
        UnitMix<kWidth>::mix(values, book, mass.data(), own_sums);
      else
        mix(values, book, mass.data(), rows, own_sums);
      for (int r = 0; r < kWidth; r++) {
        total[item * kWidth + r] = sum_of[r];
        skipped[item * kWidth + r] = lost[r] * values.longest[call.value.head + g];
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
  if (!call.key.books || !call.value.books || call.shared * call.queries > kStepRows || call.tokens < kStepKeys ||
      call.value.books->size > kStepCodewords)
    return false;
  const RotatedPlan plan(call);
  if (call.positions && !call.center ? !plan.possible : call.key.books->size > kStepCodewords) return false;
  const bool narrow = call.shared * call.queries <= 4;
  const auto run = narrow ? Step<4>::run : Step<8>::run;
  if (!run(call, plan, call.skip) && !run(call, plan, 0)) throw std::logic_error("skipping nothing lost something");
  return true;
}

}  // namespace kvfold
