// Attention in the Python module.
#include "module.h"

#include <algorithm>

#include "pool.h"

namespace kvfold {
namespace {

using Scale = nb::ndarray<nb::ro, nb::device::cpu>;  // float16, or uint8, the upper bits of them

Side coded_side(const Array<const uint8_t>& packed, const Scale& scale, int bits, const Books& books,
                int64_t batch, int64_t tokens) {
  require(bits >= 1 && bits <= 16 && books.size <= int64_t{1} << bits, "codes of 1 to 16 bits that number all codewords");
  const int64_t bytes = (books.codes() * bits + 7) / 8;
  require_shape(packed, {batch, books.heads, tokens, bytes}, "packed codes, not [B, G, T, bytes]");
  const bool short_scale = scale.dtype() == nb::dtype<uint8_t>();
  require(short_scale || is_half(scale.dtype()), "scale of uint8 or float16");
  require_shape(scale, {batch, books.heads, tokens, 1}, "scale, not [B, G, T, 1]");
  require(bytes <= 1 || packed.stride(3) == 1, "packed codes have gaps within a token");
  Side side;
  side.books = &books;
  side.packed = packed.data();
  side.scale = scale.data();
  side.short_scale = short_scale;
  side.bits = bits;
  side.batch_stride = packed.stride(0), side.head_stride = packed.stride(1), side.token_stride = packed.stride(2);
  side.scale_batch_stride = scale.stride(0), side.scale_head_stride = scale.stride(1), side.scale_token_stride = scale.stride(2);
  side.dim = books.head_dim();
  return side;
}

using Dense = nb::ndarray<nb::ro, nb::device::cpu>;  // float32 or bfloat16

Side dense_side(const Dense& vectors, int64_t batch, int64_t heads, int64_t tokens) {
  require(vectors.ndim() == 4, "keys and values [B, G, T, D]");
  require_shape(vectors, {batch, heads, tokens, static_cast<int64_t>(vectors.shape(3))}, "keys and values, not [B, G, T, D]");
  require(vectors.shape(3) <= 1 || vectors.stride(3) == 1, "keys or values have gaps within a token");
  Side side;
  side.half = is_bfloat16(vectors.dtype());
  require(side.half || vectors.dtype() == nb::dtype<float>(), "keys and values of float32 or bfloat16");
  side.dense = vectors.data();
  side.batch_stride = vectors.stride(0), side.head_stride = vectors.stride(1), side.token_stride = vectors.stride(2);
  side.dim = vectors.shape(3);
  return side;
}

// Queries as they came, and in float32: bfloat16 is widened.
struct Queries {
  const Dense& given;
  bool half;
  const float* data;

  Queries(const Dense& query, int threads) : given(query), half(is_bfloat16(query.dtype())), data(static_cast<const float*>(query.data())) {
    require(half || query.dtype() == nb::dtype<float>(), "query of float32 or bfloat16");
    require_dense(query, "query");
    if (!half) return;
    constexpr int64_t kPiece = 1 << 16;
    const auto* from = static_cast<const uint16_t*>(query.data());
    const int64_t size = static_cast<int64_t>(query.size());
    wide_.resize(size);
    parallel_for(threads, (size + kPiece - 1) / kPiece, [&](int64_t piece) {
      for (int64_t i = piece * kPiece; i < std::min(size, (piece + 1) * kPiece); i++) wide_[i] = from_bfloat16(from[i]);
    });
    data = wide_.data();
  }

 private:
  Aligned<float> wide_;
};

using Mask = std::optional<nb::ndarray<nb::ro, nb::device::cpu>>;  // uint8, a mask, or int32, the bounds of spans

// The queries of `call`, which knows the keys, and its mask.
void place_query(AttendCall& call, const Queries& read, const Mask& mask) {
  const Dense& query = read.given;
  require(query.ndim() == 4, "query [B, H, Q, D]");
  const int64_t batch = call.batch, heads = query.shape(1), queries = query.shape(2);
  require_shape(query, {batch, heads, queries, call.key.dim}, "query, not [B, H, Q, D] of the keys");
  require(call.kv_heads > 0 && heads % call.kv_heads == 0, "query heads, no multiple of KV heads");
  call.query = read.data;
  call.half = read.half;
  call.shared = heads / call.kv_heads;
  call.queries = queries;
  if (mask && mask->dtype() == nb::dtype<int32_t>()) {
    require(mask->ndim() == 3, "bounds of spans [Q, n, 2]");
    require_shape(*mask, {queries, static_cast<int64_t>(mask->shape(1)), 2}, "bounds of spans, not [Q, n, 2]");
    require_dense(*mask, "bounds of spans");
    call.spans = static_cast<const int32_t*>(mask->data());
    call.span_count = mask->shape(1);
  } else if (mask) {
    require(mask->dtype() == nb::dtype<uint8_t>() && mask->ndim() == 4, "mask [B or 1, 1, Q, T]");
    const int64_t rows = mask->shape(0);
    require(rows == 1 || rows == batch, "mask, not [B or 1, 1, Q, T]");
    require_shape(*mask, {rows, 1, queries, call.tokens}, "mask, not [B or 1, 1, Q, T]");
    call.mask = static_cast<const uint8_t*>(mask->data());
    call.mask_batch_stride = rows == 1 ? 0 : mask->stride(0);
    call.mask_query_stride = mask->stride(2);
    call.mask_token_stride = mask->stride(3);
  }
}

// Where the results of `call` go, which knows the queries.
void place_results(AttendCall& call, const Array<float>& out, const Array<float>& lse) {
  const int64_t heads = call.kv_heads * call.shared;
  require_shape(out, {call.batch, heads, call.queries, call.value.dim}, "out, not [B, H, Q, D] of the values");
  require_shape(lse, {call.batch, heads, call.queries}, "lse, not [B, H, Q]");
  require_dense(out, "out");
  require_dense(lse, "lse");
  call.out = out.data();
  call.lse = lse.data();
}

// Exact keys and values, and how they are attended.
AttendCall exact_call(const Dense& keys, const Dense& values, float softmax_scale, float softcap, int threads) {
  require(keys.ndim() == 4, "keys [B, G, T, D]");
  AttendCall call{};
  call.batch = keys.shape(0), call.kv_heads = keys.shape(1), call.tokens = keys.shape(2);
  call.key = dense_side(keys, call.batch, call.kv_heads, call.tokens);
  call.value = dense_side(values, call.batch, call.kv_heads, call.tokens);
  call.softmax_scale = softmax_scale;
  call.softcap = softcap;
  call.threads = threads;
  return call;
}

using Center = std::optional<Array<const float>>;
using Positions = std::optional<Array<const int32_t>>;
using Frequencies = std::optional<Array<const float>>;

// Where keys stand and how they are rotated there; `call` knows the keys.
void place_keys(AttendCall& call, const Center& key_center, const Positions& positions, const Frequencies& inv_freq, float factor,
                bool interleaved) {
  require(positions.has_value() == inv_freq.has_value(), "positions and inv_freq together");
  if (positions) {
    const Turn turn = turn_of(*positions, *inv_freq, factor, interleaved, call.batch, call.tokens, call.key.dim);
    call.positions = turn.positions;
    call.positions_stride = turn.positions_stride;
    call.inv_freq = turn.inv_freq;
    call.rotary = turn.rotary;
    call.factor = turn.factor;
    call.interleaved = turn.interleaved;
  }
  if (key_center) {
    require(positions.has_value(), "a center comes with positions");
    require_shape(*key_center, {call.kv_heads, call.key.dim}, "center, not [G, D]");
    require_dense(*key_center, "center");
    call.center = key_center->data();
  }
}

// Coded keys and values that queries come to again and again, looked through once.
class Past {
 public:
  Past(const Array<const uint8_t>& key_packed, const Scale& key_scale, int key_bits, const Books& key_books,
       const Array<const uint8_t>& value_packed, const Scale& value_scale, int value_bits, const Books& value_books,
       const Center& key_center, const Positions& positions, const Frequencies& inv_freq, float factor, bool interleaved)
      : key_packed_(key_packed), value_packed_(value_packed), key_scale_(key_scale), value_scale_(value_scale),
        center_(key_center), positions_(positions), inv_freq_(inv_freq) {
    require(key_packed.ndim() == 4, "packed codes [B, G, T, bytes]");
    call_.batch = key_packed.shape(0), call_.kv_heads = key_books.heads, call_.tokens = key_packed.shape(2);
    require(value_books.heads == key_books.heads, "keys and values of one number of KV heads");
    call_.key = coded_side(key_packed, key_scale, key_bits, key_books, call_.batch, call_.tokens);
    call_.value = coded_side(value_packed, value_scale, value_bits, value_books, call_.batch, call_.tokens);
    place_keys(call_, key_center, positions, inv_freq, factor, interleaved);
  }

  void attend(const Dense& query, const Mask& mask, const std::optional<Dense>& exact_keys, const std::optional<Dense>& exact_values,
              const Mask& exact_mask, float softmax_scale, float softcap, float skip, int threads, const Array<float>& out,
              const Array<float>& lse) const {
    const Queries queries(query, threads);
    AttendCall call = call_;
    call.softmax_scale = softmax_scale;
    call.softcap = softcap;
    call.skip = skip;
    call.threads = threads;
    place_query(call, queries, mask);
    place_results(call, out, lse);
    require(exact_keys.has_value() == exact_values.has_value(), "exact keys and values together");
    std::optional<AttendCall> exact;
    if (exact_keys) {
      exact = exact_call(*exact_keys, *exact_values, softmax_scale, softcap, threads);
      require(exact->kv_heads == call.kv_heads && exact->value.dim == call.value.dim, "exact keys and values unlike the coded ones");
      place_query(*exact, queries, exact_mask);
    }
    if (lse.size() == 0) return;
    nb::gil_scoped_release free;
    kvfold::attend(call);
    if (exact) attend_too(*exact, call);
  }

 private:
  Array<const uint8_t> key_packed_, value_packed_;  // these and the next keep alive what `call_` points to
  Scale key_scale_, value_scale_;
  Center center_;
  Positions positions_;
  Frequencies inv_freq_;
  AttendCall call_{};
};

void attend_codes_in_pages(const Dense& query, const Array<const int32_t>& table, const Array<const int32_t>& lengths,
                           const Array<const uint8_t>& key_packed, const Scale& key_scale, int key_bits, const Books& key_books,
                           const Array<const uint8_t>& value_packed, const Scale& value_scale, int value_bits,
                           const Books& value_books, const Center& key_center, const Positions& positions,
                           const Frequencies& inv_freq, float factor, bool interleaved, float softmax_scale, float softcap, float skip, int threads, const Array<float>& out) {
  require(key_packed.ndim() == 4, "packed codes [N, G, block, bytes]");
  PagesCall call{};
  call.pages = key_packed.shape(0), call.block = key_packed.shape(2), call.rows = lengths.size();
  const int64_t kv_heads = key_books.heads;
  require(value_books.heads == kv_heads, "keys and values of one number of KV heads");
  call.key = coded_side(key_packed, key_scale, key_bits, key_books, call.pages, call.block);
  call.value = coded_side(value_packed, value_scale, value_bits, value_books, call.pages, call.block);
  const auto begin = [](const Side& side, bool scale) { return scale ? static_cast<const uint8_t*>(side.scale) : side.packed; };
  call.first = std::min({begin(call.key, false), begin(call.key, true), begin(call.value, false), begin(call.value, true)});
  for (const Side* side : {&call.key, &call.value}) {
    const int64_t wide = side->short_scale ? 1 : 2, bytes = (side->books->codes() * side->bits + 7) / 8;
    const int64_t codes_end = side->packed + bytes - call.first, scale_end = begin(*side, true) + wide - call.first;
    call.record = std::max({call.record, codes_end, scale_end});
    const auto strides_like = [&](int64_t count, int64_t stride, int64_t scale_stride, int64_t like) {
      return count <= 1 || (stride == like && scale_stride * wide == like);
    };
    require(strides_like(call.pages, side->batch_stride, side->scale_batch_stride, call.key.batch_stride) &&
                strides_like(kv_heads, side->head_stride, side->scale_head_stride, call.key.head_stride) &&
                strides_like(call.block, side->token_stride, side->scale_token_stride, call.key.token_stride) &&
                call.key.token_stride % wide == 0 && (scale_end - wide) % wide == 0,
            "fields of the codes that do not lie together in a token");
  }
  require(call.block >= 1 && call.record <= call.key.token_stride, "fields of the codes that do not lie together in a token");
  require(query.ndim() == 3, "query [R, H, D]");
  const int64_t heads = query.shape(1);
  require_shape(query, {call.rows, heads, call.key.dim}, "query, not [R, H, D] of the keys");
  require(heads % kv_heads == 0, "query heads, no multiple of KV heads");
  require_shape(out, {call.rows, heads, call.value.dim}, "out, not [R, H, D] of the values");
  require(lengths.ndim() == 1 && table.ndim() == 2 && static_cast<int64_t>(table.shape(0)) == call.rows, "table [R, n] and lengths [R]");
  require(table.shape(1) <= 1 || table.stride(1) == 1, "a table with gaps within a row");
  const Queries queries(query, threads);
  require_dense(out, "out");
  require_dense(lengths, "lengths");
  int64_t longest = 0;
  for (int64_t row = 0; row < call.rows; row++) {
    const int64_t length = lengths.data()[row];
    require(length >= 0 && length <= call.block * static_cast<int64_t>(table.shape(1)), "a row longer than its pages");
    longest = std::max(longest, length);
  }
  AttendCall& row = call.row;
  row.query = queries.data, row.half = queries.half, row.out = out.data();
  row.batch = row.queries = 1, row.kv_heads = kv_heads, row.shared = heads / kv_heads;
  row.tokens = longest, row.key = call.key;
  place_keys(row, key_center, positions, inv_freq, factor, interleaved);
  row.softmax_scale = softmax_scale, row.softcap = softcap, row.skip = skip, row.threads = threads;
  call.table = table.data(), call.table_stride = table.stride(0), call.lengths = lengths.data();
  nb::gil_scoped_release free;
  attend_pages(call);
}

void attend_exact(const Dense& query, const Dense& keys, const Dense& values, const Mask& mask, float softmax_scale, float softcap,
                  int threads, const Array<float>& out, const Array<float>& lse) {
  const Queries queries(query, threads);
  AttendCall call = exact_call(keys, values, softmax_scale, softcap, threads);
  place_query(call, queries, mask);
  place_results(call, out, lse);
  if (lse.size() == 0) return;
  nb::gil_scoped_release free;
  attend(call);
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<Past>(m, "Past")
      .def(nb::init<const Array<const uint8_t>&, const Scale&, int, const Books&, const Array<const uint8_t>&, const Scale&, int,
                    const Books&, const Center&, const Positions&, const Frequencies&, float, bool>(),
           nb::keep_alive<1, 5>(), nb::keep_alive<1, 9>(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg())
      .def("attend", &Past::attend, nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  m.def("attend_pages", &attend_codes_in_pages, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  m.def("attend_exact", &attend_exact, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg());
}

}  // namespace kvfold
