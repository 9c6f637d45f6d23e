// Attention of any number of queries: keys and values of one tile at a time as float32, scores and sums as small matrix
// products, softmax online (Milakov & Gimelshein, arXiv 1805.02867). Memory does not grow with the context.
#pragma once

#include "attend_parts.h"
#include "attend_seen.h"

namespace kvfold {

constexpr int64_t kTile = 64;    // keys
constexpr int64_t kRowsGoal = 384;  // query rows (heads that share a KV head, times queries) of a piece of work
constexpr int64_t kChunk = 4096;   // keys of a piece of work when there is one query

// Channel order of a decoded tile. Rotated keys come as first members of the pairs, second members, the rest, so that a
// rotation is arithmetic on whole vectors; everything else as it was coded.
struct Order {
  std::vector<int32_t> channels;  // entry of the tile -> channel of the head
  std::vector<int32_t> source;    // entry of the tile -> entry of the coded vector; empty: the same

  Order(const Side& side, const AttendCall* rotation) {
    const int64_t dim = side.dim;
    if (rotation) {
      const int64_t n = rotation->rotary;
      for (int64_t i = 0; i < n; i++) channels.push_back(static_cast<int32_t>(rotation->interleaved ? 2 * i : i));
      for (int64_t i = 0; i < n; i++) channels.push_back(static_cast<int32_t>(rotation->interleaved ? 2 * i + 1 : i + n));
      for (int64_t i = 2 * n; i < dim; i++) channels.push_back(static_cast<int32_t>(i));
    } else {
      for (int64_t i = 0; i < dim; i++) channels.push_back(side.books ? side.books->channels[i] : static_cast<int32_t>(i));
    }
    if (!side.books || channels == side.books->channels) return;
    std::vector<int32_t> at(dim);
    for (int64_t i = 0; i < dim; i++) at[side.books->channels[i]] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < dim; i++) source.push_back(at[channels[i]]);
  }
};

// to[j] = sum over s of codewords[s][j], in the order of the stages.
inline void add_up(const float* const* codewords, int64_t stages, int64_t dim, float* to) {
  int64_t j = 0;
  for (; j + 2 * lanes <= dim; j += 2 * lanes) {
    vf low = load(codewords[0] + j), high = load(codewords[0] + j + lanes);
    for (int64_t s = 1; s < stages; s++) {
      low += load(codewords[s] + j);
      high += load(codewords[s] + j + lanes);
    }
    store(to + j, low);
    store(to + j + lanes, high);
  }
  for (; j < dim; j++) {
    float total = codewords[0][j];
    for (int64_t s = 1; s < stages; s++) total += codewords[s][j];
    to[j] = total;
  }
}

// Vectors of scale 1 of tokens first..first+count-1, `[count][dim]`.
inline void decode_tile(const Side& side, const Order& order, int64_t b, int64_t g, int64_t first, int64_t count,
                        std::vector<uint16_t>& codes, float* to) {
  const Books& books = *side.books;
  codes.resize(kTile * books.codes());
  unpack(side, code_row(side, b, g, first), count, codes.data());
  const int32_t* book = books.book.data() + (side.head + g) * books.codes();
  std::vector<const float*> codewords(books.stages);
  std::vector<float> coded(order.source.empty() ? 0 : side.dim);
  for (int64_t t = 0; t < count; t++) {
    const uint16_t* code = codes.data() + t * books.codes();
    float* vector = order.source.empty() ? to + t * side.dim : coded.data();
    for (int64_t p = 0; p < books.groups; p++) {
      for (int64_t s = 0; s < books.stages; s++) {
        const int64_t l = s * books.groups + p;
        codewords[s] = books.table(book[l]) + code[l] * books.dim;
      }
      add_up(codewords.data(), books.stages, books.dim, vector + p * books.dim);
    }
    if (!order.source.empty())
      for (int64_t i = 0; i < side.dim; i++) to[t * side.dim + i] = coded[order.source[i]];
  }
}

inline void rotate_tile(const AttendCall& call, int64_t b, int64_t first, int64_t count, int64_t dim, float* keys) {
  const int64_t n = call.rotary;
  for (int64_t t = 0; t < count; t++) {
    const float position = static_cast<float>(call.positions[b * call.positions_stride + first + t]);
    float *x = keys + t * dim, *y = x + n;
    for (int64_t i = 0; i < n; i++) {
      float sine, cosine;
      sine_cosine(position * call.inv_freq[i], &sine, &cosine);
      const float a = x[i], c = y[i];
      x[i] = (a * cosine - c * sine) * call.factor;
      y[i] = (c * cosine + a * sine) * call.factor;
    }
  }
}

// keys = keys * scales + the rotated center of KV head `g`; `scales` become 1.
inline void add_center(const AttendCall& call, const Order& order, int64_t b, int64_t g, int64_t first, int64_t count, float* scales,
                       std::vector<float>& center, float* keys) {
  const int64_t dim = call.key.dim;
  center.resize(count * dim);
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < dim; i++) center[t * dim + i] = call.center[g * dim + order.channels[i]];
  rotate_tile(call, b, first, count, dim, center.data());
  for (int64_t t = 0; t < count; t++) {
    for (int64_t i = 0; i < dim; i++) keys[t * dim + i] = keys[t * dim + i] * scales[t] + center[t * dim + i];
    scales[t] = 1;
  }
}

// scores[t][r] = keys[t] . query column r, for `rows` (a multiple of `lanes`) columns of `query [dim][rows]`.
template <int kWide>
inline void score_strip(const float* keys, int64_t count, int64_t dim, const float* query, int64_t rows, float* scores) {
  constexpr int kKeys = 4;
  for (int64_t t = 0; t < count; t += kKeys) {  // the tile has room for a multiple of kKeys
    vf acc[kKeys][kWide];
    for (auto& row : acc)
      for (vf& a : row) a = vf{};
    for (int64_t d = 0; d < dim; d++) {
      vf column[kWide];
      for (int w = 0; w < kWide; w++) column[w] = hold(load(query + d * rows + w * lanes));
      for (int k = 0; k < kKeys; k++) {
        const vf entry = splat(keys[(t + k) * dim + d]);
        for (int w = 0; w < kWide; w++) acc[k][w] += entry * column[w];
      }
    }
    for (int k = 0; k < kKeys; k++)
      for (int w = 0; w < kWide; w++) store(scores + (t + k) * rows + w * lanes, acc[k][w]);
  }
}

inline void score_tile(const float* keys, int64_t count, int64_t dim, const float* query, int64_t rows, float* scores) {
  int64_t r = 0;
  for (; r + 4 * lanes <= rows; r += 4 * lanes) score_strip<4>(keys, count, dim, query + r, rows, scores + r);
  for (; r + 2 * lanes <= rows; r += 2 * lanes) score_strip<2>(keys, count, dim, query + r, rows, scores + r);
  for (; r < rows; r += lanes) score_strip<1>(keys, count, dim, query + r, rows, scores + r);
}

// The same for a few queries `[few][dim]`, by dot products.
inline void score_few(const float* keys, int64_t count, int64_t dim, const float* query, int64_t few, int64_t rows,
                      float* scores) {
  const int64_t whole = dim / lanes * lanes;
  for (int64_t t = 0; t < count; t++)
    for (int64_t r = 0; r < few; r++) {
      const float *k = keys + t * dim, *q = query + r * dim;
      vf acc = vf{};
      for (int64_t d = 0; d < whole; d += lanes) acc += load(k + d) * load(q + d);
      float total = sum(acc);
      for (int64_t d = whole; d < dim; d++) total += k[d] * q[d];
      scores[t * rows + r] = total;
    }
}

// sums[r][d] += sum over t of weights[t][r] * values[t][d]; kRowsOf rows from `weights`.
template <int kRowsOf>
inline void add_values(const float* weights, int64_t rows, const float* values, int64_t count, int64_t dim, float* sums) {
  constexpr int kWide = 4;
  int64_t d = 0;
  for (; d + kWide * lanes <= dim; d += kWide * lanes) {
    vf acc[kRowsOf][kWide];
    for (int r = 0; r < kRowsOf; r++)
      for (int w = 0; w < kWide; w++) acc[r][w] = load(sums + r * dim + d + w * lanes);
    for (int64_t t = 0; t < count; t++) {
      vf value[kWide];
      for (int w = 0; w < kWide; w++) value[w] = hold(load(values + t * dim + d + w * lanes));
      for (int r = 0; r < kRowsOf; r++) {
        const vf weight = splat(weights[t * rows + r]);
        for (int w = 0; w < kWide; w++) acc[r][w] += weight * value[w];
      }
    }
    for (int r = 0; r < kRowsOf; r++)
      for (int w = 0; w < kWide; w++) store(sums + r * dim + d + w * lanes, acc[r][w]);
  }
  for (; d < dim; d++)
    for (int r = 0; r < kRowsOf; r++) {
      float total = sums[r * dim + d];
      for (int64_t t = 0; t < count; t++) total += weights[t * rows + r] * values[t * dim + d];
      sums[r * dim + d] = total;
    }
}

// Whether any of queries first..first+count-1 sees a key of the tile.
inline bool visible(const AttendCall& call, int64_t b, int64_t first, int64_t count, int64_t key, int64_t keys) {
  for (int64_t q = first; q < first + count; q++)
    if (keys_seen(call, b, q, key, keys)) return true;
  return false;
}

inline void attend_tiles(const AttendCall& call) {
  const int64_t dim = call.key.dim, value_dim = call.value.dim, queries = call.queries;
  const int64_t block = std::max<int64_t>(1, std::min(queries, kRowsGoal / call.shared));  // queries of a piece of work
  const int64_t blocks = (queries + block - 1) / block;
  const int64_t chunk = queries == 1 ? kChunk : std::max<int64_t>(call.tokens, 1);
  const int64_t chunks = std::max<int64_t>(1, (call.tokens + chunk - 1) / chunk);
  const int64_t most_rows = call.shared * block, padded = (most_rows + lanes - 1) / lanes * lanes;
  const bool rotated = call.positions != nullptr;
  const Order key_order(call.key, rotated ? &call : nullptr), value_order(call.value, nullptr);
  const int64_t pairs = call.batch * call.kv_heads;
  // Parts of a pair's keys live until they are joined; more than one only for a single query.
  std::vector<float> sums(pairs * blocks * chunks * most_rows * value_dim);
  std::vector<float> top(pairs * blocks * chunks * most_rows, kMinusInfinity), total(top.size(), 0.0f);

  parallel_for(call.threads, pairs * blocks * chunks, [&](int64_t item) {
    const int64_t part = item % chunks, place = item / chunks % blocks, pair = item / chunks / blocks;
    const int64_t b = pair / call.kv_heads, g = pair % call.kv_heads;
    const int64_t first_query = place * block, count_queries = std::min(block, queries - first_query);
    const int64_t rows = call.shared * count_queries;
    const bool few = rows <= 4;
    Aligned<float> query(few ? rows * dim : dim * padded, 0.0f);  // few: [rows][dim], else [dim][padded]
    for (int64_t r = 0; r < rows; r++) {
      const float* from = call.query + ((pair * call.shared + r / count_queries) * queries + first_query + r % count_queries) * dim;
      for (int64_t i = 0; i < dim; i++) {
        const float x = from[key_order.channels[i]] * call.softmax_scale;
        (few ? query[r * dim + i] : query[i * padded + r]) = x;
      }
    }
    Aligned<float> keys(kTile * dim, 0.0f), values(kTile * value_dim, 0.0f), scores(kTile * padded, 0.0f), scales(kTile);
    std::vector<uint16_t> codes;
    std::vector<float> center;
    float* const own_sums = sums.data() + item * most_rows * value_dim;
    std::vector<float> own_top(padded, kMinusInfinity), own_total(padded, 0.0f);
    const int64_t last = std::min((part + 1) * chunk, call.tokens);
    for (int64_t first = part * chunk; first < last; first += kTile) {
      const int64_t count = std::min(kTile, last - first);
      if (!sees_all(call) && !visible(call, b, first_query, count_queries, first, count)) continue;
      if (call.key.books) {
        decode_tile(call.key, key_order, b, g, first, count, codes, keys.data());
        read_scales(call.key, b, g, first, count, scales.data());
      } else {
        read_dense(call.key, b, g, first, count, keys.data());
        std::fill(scales.begin(), scales.end(), 1.0f);
      }
      if (call.center)
        add_center(call, key_order, b, g, first, count, scales.data(), center, keys.data());
      else if (rotated)
        rotate_tile(call, b, first, count, dim, keys.data());
      if (few)
        score_few(keys.data(), count, dim, query.data(), rows, padded, scores.data());
      else
        score_tile(keys.data(), count, dim, query.data(), padded, scores.data());
      std::vector<float>& best = own_top;
      std::vector<float> before = own_top;
      for (int64_t t = 0; t < count; t++)
        for (int64_t r = 0; r < padded; r += lanes) {
          float* at = scores.data() + t * padded + r;
          vf score = load(at) * scales[t];
          if (call.softcap != 0) score = capped(score, call.softcap);
          store(at, score);
        }
      if (!sees_all(call))
        for (int64_t r = 0; r < rows; r++) {
          uint64_t hidden = keys_hidden(call, b, first_query + r % count_queries, first, count);
          for (; hidden; hidden &= hidden - 1) scores[__builtin_ctzll(hidden) * padded + r] = kMinusInfinity;
        }
      for (int64_t t = 0; t < count; t++)
        for (int64_t r = 0; r < padded; r += lanes) store(best.data() + r, larger(load(best.data() + r), load(&scores[t * padded + r])));
      for (int64_t r = 0; r < rows; r++) {
        if (best[r] == before[r]) continue;
        const float keep = before[r] == kMinusInfinity ? 0.0f : std::exp(before[r] - best[r]);
        own_total[r] *= keep;
        for (int64_t d = 0; d < value_dim; d++) own_sums[r * value_dim + d] *= keep;
      }
      if (call.value.books) read_scales(call.value, b, g, first, count, scales.data());
      for (int64_t r = 0; r < padded; r += lanes) {
        vf highest = load(best.data() + r), sum_of = load(own_total.data() + r);
        highest = highest == kMinusInfinity ? vf{} : highest;
        for (int64_t t = 0; t < count; t++) {
          float* at = scores.data() + t * padded + r;
          const vf weight = exp_of(load(at) - highest);
          sum_of += weight;
          store(at, weight * scales[t]);
        }
        store(own_total.data() + r, sum_of);
      }
      if (call.value.books) {
        decode_tile(call.value, value_order, b, g, first, count, codes, values.data());
      } else {
        read_dense(call.value, b, g, first, count, values.data());
      }
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4)
        add_values<4>(scores.data() + r, padded, values.data(), count, value_dim, own_sums + r * value_dim);
      for (; r < rows; r++)
        add_values<1>(scores.data() + r, padded, values.data(), count, value_dim, own_sums + r * value_dim);
    }
    std::copy_n(own_top.data(), rows, top.data() + item * most_rows);
    std::copy_n(own_total.data(), rows, total.data() + item * most_rows);
  });

  parallel_for(call.threads, pairs * blocks, [&](int64_t item) {
    const int64_t place = item % blocks, pair = item / blocks;
    const int64_t first_query = place * block, count_queries = std::min(block, queries - first_query);
    const int64_t rows = call.shared * count_queries;
    std::vector<Part> parts;
    for (int64_t i = item * chunks; i < (item + 1) * chunks; i++)
      parts.push_back({sums.data() + i * most_rows * value_dim, top.data() + i * most_rows, total.data() + i * most_rows});
    std::vector<float> out(rows * value_dim), lse(rows);
    join(parts, {}, 0, rows, value_dim, out.data(), lse.data());
    for (int64_t r = 0; r < rows; r++) {
      const int64_t to = (pair * call.shared + r / count_queries) * queries + first_query + r % count_queries;
      for (int64_t i = 0; i < value_dim; i++) call.out[to * value_dim + value_order.channels[i]] = out[r * value_dim + i];
      call.lse[to] = lse[r];
    }
  });
}

}  // namespace kvfold
