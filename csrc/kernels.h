// The ops on flat arrays. Sizes are explicit and were checked by the caller (module.h); codes
// are checked here, since that takes a look at them.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "books.h"

namespace kvfold {

struct CodeOutOfRange : std::invalid_argument {
  CodeOutOfRange() : std::invalid_argument("a code names a codeword that is not there") {}
};

struct NonFinite : std::invalid_argument {
  NonFinite() : std::invalid_argument("NaN or Inf") {}
};

// vectors [batch, heads, tokens, groups, dim] with dense (tokens, groups, dim); codes int32 [batch, heads, tokens, stages,
// groups].
struct EncodeCall {
  const float* vectors;
  int32_t* codes;
  int64_t batch, tokens, beam;
  const Books* books;
  int threads;
};

// Where keys stand and how they were rotated there: positions [batch or 1, tokens] with stride 0 if all share them, null for keys
// that are not rotated; inv_freq [rotary].
struct Turn {
  const int32_t* positions = nullptr;
  int64_t positions_stride = 0;
  const float* inv_freq = nullptr;
  int64_t rotary = 0;
  float factor = 1;
  bool interleaved = false;
};

// Where codes and scales are kept: rows [batch, heads, tokens], strides in bytes and in scales. With `slots`, those of token t are in
// page slots[t] / block, at its place slots[t] % block: a page takes the place of a batch row; a token of negative slot is not kept.
struct Stored {
  uint8_t* packed;
  void* scale;  // float16, or its bits 7 to 14 in a byte if `short_scale`
  bool short_scale;
  int64_t batch_stride, head_stride, token_stride;
  int64_t scale_batch_stride, scale_head_stride, scale_token_stride;
  const int64_t* slots = nullptr;
  int64_t block = 1;

  bool keeps(int64_t t) const { return !slots || slots[t] >= 0; }
  uint8_t* packed_of(int64_t b, int64_t g, int64_t t) const {
    if (slots) b = slots[t] / block, t = slots[t] % block;
    return packed + b * batch_stride + g * head_stride + t * token_stride;
  }
  int64_t scale_of(int64_t b, int64_t g, int64_t t) const {
    if (slots) b = slots[t] / block, t = slots[t] % block;
    return b * scale_batch_stride + g * scale_head_stride + t * scale_token_stride;
  }
};

// x [batch, heads, tokens, groups * dim] with strides in elements, float32, or bfloat16 if `half`, rotated as `turn` says; `channels`
// [groups * dim]; `weights` [heads, groups, dim, dim] or null.
struct ScaleCall {
  const void* x;
  bool half;
  const int64_t* channels;
  const float* weights;
  int64_t batch, heads, tokens, groups, dim;
  int64_t batch_stride, head_stride, token_stride;
  Turn turn;
};

// From vectors to what is stored of them, with the books of the search.
struct CodeCall {
  ScaleCall scaling;
  Stored to;
  int bits;
  int64_t beam;
  const Books* books;
};

// x [batch, heads, tokens, dim] with strides in elements, out dense.
struct RopeCall {
  const float* x;
  float* out;
  int64_t batch, heads, tokens, dim;
  int64_t batch_stride, head_stride, token_stride;
  Turn turn;
  int threads;
};

struct DecodeCall {
  const int32_t* codes;
  float* vectors;
  int64_t batch, tokens;
  const Books* books;
  int threads;
};

// One side of attention. Codes: `packed` rows of `bits`-bit codes with strides in bytes; `scale` with strides in elements, float16
// or, if `short_scale`, the bits 7 to 14 of one in a byte. Dense: `dense` float32, or
// bfloat16 if `half`, with strides in elements; then `books` is null.
struct Side {
  const Books* books = nullptr;
  const uint8_t* packed = nullptr;
  const void* scale = nullptr;
  bool short_scale = false;
  const void* dense = nullptr;
  bool half = false;
  int bits = 0;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
  int64_t scale_batch_stride = 0, scale_head_stride = 0, scale_token_stride = 0;
  int64_t dim = 0;   // D
  int64_t head = 0;  // whose codebooks the first KV head reads
};

struct AttendCall {
  const float* query;  // [batch, kv_heads, shared, queries, key.dim], dense
  float* out;          // [batch, kv_heads, shared, queries, value.dim]
  float* lse;          // [batch, kv_heads, shared, queries]
  int64_t batch, kv_heads, shared, queries, tokens;
  Side key, value;
  const int32_t* positions = nullptr;  // [batch or 1, tokens]; null: keys are read as they are
  const float* center = nullptr;       // [kv_heads, key.dim]: it alone is rotated, then added to the keys; null: keys are rotated
  int64_t positions_stride = 0;        // 0 if all of the batch share them
  const float* inv_freq = nullptr;     // [rotary]
  int64_t rotary = 0;
  float factor = 1;
  bool interleaved = false;
  const uint8_t* mask = nullptr;  // [batch or 1, queries, tokens], 0 hides
  int64_t mask_batch_stride = 0, mask_query_stride = 0, mask_token_stride = 1;
  const int32_t* spans = nullptr;  // in place of a mask: [queries][span_count] runs of keys that are seen, first and behind the last
  int64_t span_count = 0;
  bool half = false;  // queries came in bfloat16: products of that precision will do
  float softmax_scale = 1;
  float softcap = 0;  // 0: none
  float skip = 0;     // allowed error of the output over its norm, from keys whose values are not read
  int threads = 1;
  int64_t pieces = 8;  // of a step wanted: they share out, but each has masses and codebook products of its own
};

// Rows of one query each, whose codes lie in pages: `key` and `value` are those of all pages, a page in place of a batch row and
// `block` tokens each. A token's fields lie together: `record` bytes from the first of them, which for page 0 is at `first`.
struct PagesCall {
  AttendCall row;  // what holds for every row; query, out [rows, kv_heads, shared, dim]
  Side key, value;
  const uint8_t* first;
  int64_t record, pages, block, rows;
  const int32_t* table;  // [rows, ..] with `table_stride`: pages of each row in order
  int64_t table_stride;
  const int32_t* lengths;  // [rows], 0 for a row that is not there
};

void encode(const EncodeCall&);
// Codes both sides of a layer, or one; throws NonFinite for NaN or Inf if `checked`.
void code(const CodeCall* calls, int64_t count, bool checked, int threads);
void decode(const DecodeCall&);
void unrotate(const RopeCall&);
void attend(const AttendCall&);
// Attends to further keys with the same queries; the results of `before`, which is done, become those of the keys of both.
void attend_too(const AttendCall& call, const AttendCall& before);
void attend_pages(const PagesCall&);

}  // namespace kvfold
