// The Python module: checks shapes, finds pointers, releases the GIL. Compiled once an instruction set, as a module each:
// code that the linker might share between instruction sets would stop an older CPU.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvfold {
namespace {

template <class T>
using Array = nb::ndarray<T, nb::device::cpu>;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

template <class A>
void require_shape(const A& array, std::initializer_list<int64_t> shape, const char* what) {
  bool same = array.ndim() == shape.size();
  size_t axis = 0;
  for (int64_t size : shape) same = same && array.shape(axis) == static_cast<size_t>(size), axis++;
  if (!same) throw std::invalid_argument(std::string("shape of ") + what);
}

template <class T>
void require_dense(const Array<T>& array, const char* what) {
  if (array.size() == 0) return;
  int64_t stride = 1;
  for (size_t axis = array.ndim(); axis-- > 0; stride *= static_cast<int64_t>(array.shape(axis)))
    if (array.shape(axis) > 1 && array.stride(axis) != stride) throw std::invalid_argument(std::string(what) + " has gaps");
}

Books* make_books(const Array<const float>& codebooks, const Array<const int64_t>& book, const Array<const int64_t>& channels) {
  require(codebooks.ndim() == 3 && book.ndim() == 3, "codebooks [M, C, d] and book [S, G, P]");
  const int64_t count = codebooks.shape(0), size = codebooks.shape(1), dim = codebooks.shape(2);
  require(size >= 1 && dim >= 1, "codebooks of at least one codeword");
  require_shape(channels, {static_cast<int64_t>(book.shape(2)), dim}, "channels, not [P, d]");
  require_dense(codebooks, "codebooks");
  require_dense(book, "book");
  require_dense(channels, "channels");
  return new Books(codebooks.data(), count, size, dim, book.data(), book.shape(0), book.shape(1), book.shape(2),
                   channels.data());
}

void encode_arrays(const Array<const float>& vectors, const Books& books, int64_t beam, int threads,
                   const Array<int32_t>& codes) {
  require(vectors.ndim() == 5, "vectors [B, G, T, P, d]");
  const int64_t batch = vectors.shape(0), tokens = vectors.shape(2);
  require_shape(vectors, {batch, books.heads, tokens, books.groups, books.dim}, "vectors, not [B, G, T, P, d] of the books");
  require_shape(codes, {batch, books.heads, tokens, books.stages, books.groups}, "codes, not [B, G, T, S, P]");
  require_dense(vectors, "vectors");
  require_dense(codes, "codes");
  require(beam >= 1, "beam of at least 1");
  const EncodeCall call{vectors.data(), codes.data(), batch, tokens, beam, &books, threads};
  nb::gil_scoped_release free;
  encode(call);
}

void code_arrays(const Array<const float>& x, const Books& books, const Array<const int64_t>& channels,
                 const std::optional<Array<const float>>& weights, int bits, int64_t beam, int threads,
                 const Array<uint8_t>& packed, const nb::ndarray<nb::device::cpu>& scale) {
  require(x.ndim() == 4, "vectors [B, G, T, D]");
  const int64_t batch = x.shape(0), tokens = x.shape(2), width = books.head_dim();
  require_shape(x, {batch, books.heads, tokens, width}, "vectors, not [B, G, T, D] of the books");
  require(x.size() == 0 || x.stride(3) == 1, "vectors with gaps within a token");
  require(bits >= 1 && bits <= 16 && books.size <= int64_t{1} << bits, "codes of 1 to 16 bits that number all codewords");
  require_shape(packed, {batch, books.heads, tokens, (books.codes() * bits + 7) / 8}, "packed codes, not [B, G, T, bytes]");
  require_dense(packed, "packed codes");
  require(beam >= 1 && width >= 2, "beam of at least 1 and vectors of two channels");
  require_shape(channels, {books.groups, books.dim}, "channels, not [P, d]");
  require_dense(channels, "channels");
  for (int64_t i = 0; i < width; i++) require(channels.data()[i] >= 0 && channels.data()[i] < width, "a channel that is not there");
  ScaleCall scaling{};
  if (weights) {
    require_shape(*weights, {books.heads, books.groups, books.dim, books.dim}, "weights, not [G, P, d, d]");
    require_dense(*weights, "weights");
    scaling.weights = weights->data();
  }
  require_shape(scale, {batch, books.heads, tokens, 1}, "scale, not [B, G, T, 1]");
  require(scale.size() == 0 || scale.stride(2) == 1, "scale has gaps");
  const bool short_scale = scale.dtype() == nb::dtype<uint8_t>();
  require(short_scale || scale.dtype() == nb::dtype<uint16_t>(), "scale of uint8 or uint16");
  scaling.x = x.data(), scaling.channels = channels.data();
  if (short_scale)
    scaling.short_scales = static_cast<uint8_t*>(scale.data());
  else
    scaling.scales = static_cast<uint16_t*>(scale.data());
  scaling.batch = batch, scaling.heads = books.heads, scaling.tokens = tokens, scaling.groups = books.groups, scaling.dim = books.dim;
  scaling.batch_stride = x.stride(0), scaling.head_stride = x.stride(1), scaling.token_stride = x.stride(2);
  const CodeCall call{scaling, packed.data(), bits, beam, &books, threads};
  nb::gil_scoped_release free;
  code(call);
}

void decode_arrays(const Array<const int32_t>& codes, const Books& books, int threads, const Array<float>& vectors) {
  require(codes.ndim() == 5, "codes [B, G, T, S, P]");
  const int64_t batch = codes.shape(0), tokens = codes.shape(2);
  require_shape(codes, {batch, books.heads, tokens, books.stages, books.groups}, "codes, not [B, G, T, S, P] of the books");
  require_shape(vectors, {batch, books.heads, tokens, books.groups, books.dim}, "vectors, not [B, G, T, P, d]");
  require_dense(codes, "codes");
  require_dense(vectors, "vectors");
  const DecodeCall call{codes.data(), vectors.data(), batch, tokens, &books, threads};
  nb::gil_scoped_release free;
  decode(call);
}

void unrotate_arrays(const Array<const float>& x, const Array<const int32_t>& positions, const Array<const float>& inv_freq,
                     float factor, bool interleaved, int threads, const Array<float>& out) {
  require(x.ndim() == 4 && positions.ndim() == 2 && inv_freq.ndim() == 1, "keys [B, G, T, D], positions [B or 1, T], inv_freq [n]");
  const int64_t batch = x.shape(0), heads = x.shape(1), tokens = x.shape(2), dim = x.shape(3), rows = positions.shape(0);
  require(rows == 1 || rows == batch, "positions [B or 1, T]");
  require_shape(positions, {rows, tokens}, "positions, not [B or 1, T]");
  require(2 * static_cast<int64_t>(inv_freq.shape(0)) <= dim, "inv_freq [n], 2 n <= D");
  require(x.size() == 0 || x.stride(3) == 1, "keys with gaps within a token");
  require_shape(out, {batch, heads, tokens, dim}, "out, not that of the keys");
  require_dense(out, "out");
  require_dense(positions, "positions");
  require_dense(inv_freq, "inv_freq");
  const RopeCall call{x.data(), out.data(), positions.data(), inv_freq.data(), batch, heads, tokens, dim,
                      static_cast<int64_t>(inv_freq.shape(0)), rows == 1 ? 0 : tokens, x.stride(0), x.stride(1), x.stride(2),
                      factor, interleaved, threads};
  nb::gil_scoped_release free;
  unrotate(call);
}

using Scale = nb::ndarray<nb::ro, nb::device::cpu>;  // uint16, the bits of a float16, or uint8, the upper ones of them

Side coded_side(const Array<const uint8_t>& packed, const Scale& scale, int bits, const Books& books,
                int64_t batch, int64_t tokens) {
  require(bits >= 1 && bits <= 16 && books.size <= int64_t{1} << bits, "codes of 1 to 16 bits that number all codewords");
  const int64_t bytes = (books.codes() * bits + 7) / 8;
  require_shape(packed, {batch, books.heads, tokens, bytes}, "packed codes, not [B, G, T, bytes]");
  const bool short_scale = scale.dtype() == nb::dtype<uint8_t>();
  require(short_scale || scale.dtype() == nb::dtype<uint16_t>(), "scale of uint8 or uint16");
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

Side dense_side(const Array<const float>& vectors, int64_t batch, int64_t heads, int64_t tokens) {
  require(vectors.ndim() == 4, "keys and values [B, G, T, D]");
  require_shape(vectors, {batch, heads, tokens, static_cast<int64_t>(vectors.shape(3))}, "keys and values, not [B, G, T, D]");
  require(vectors.shape(3) <= 1 || vectors.stride(3) == 1, "keys or values have gaps within a token");
  Side side;
  side.dense = vectors.data();
  side.batch_stride = vectors.stride(0), side.head_stride = vectors.stride(1), side.token_stride = vectors.stride(2);
  side.dim = vectors.shape(3);
  return side;
}

using Mask = std::optional<Array<const uint8_t>>;

// The queries of `call`, which knows the keys, and its mask.
void place_query(AttendCall& call, const Array<const float>& query, const Mask& mask) {
  require(query.ndim() == 4, "query [B, H, Q, D]");
  const int64_t batch = call.batch, heads = query.shape(1), queries = query.shape(2);
  require_shape(query, {batch, heads, queries, call.key.dim}, "query, not [B, H, Q, D] of the keys");
  require(call.kv_heads > 0 && heads % call.kv_heads == 0, "query heads, no multiple of KV heads");
  require_dense(query, "query");
  call.query = query.data();
  call.shared = heads / call.kv_heads;
  call.queries = queries;
  if (mask) {
    require(mask->ndim() == 4, "mask [B or 1, 1, Q, T]");
    const int64_t rows = mask->shape(0);
    require(rows == 1 || rows == batch, "mask, not [B or 1, 1, Q, T]");
    require_shape(*mask, {rows, 1, queries, call.tokens}, "mask, not [B or 1, 1, Q, T]");
    call.mask = mask->data();
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
AttendCall exact_call(const Array<const float>& keys, const Array<const float>& values, bool half, float softmax_scale, float softcap,
                      int threads) {
  require(keys.ndim() == 4, "keys [B, G, T, D]");
  AttendCall call{};
  call.batch = keys.shape(0), call.kv_heads = keys.shape(1), call.tokens = keys.shape(2);
  call.key = dense_side(keys, call.batch, call.kv_heads, call.tokens);
  call.value = dense_side(values, call.batch, call.kv_heads, call.tokens);
  call.half = half;
  call.softmax_scale = softmax_scale;
  call.softcap = softcap;
  call.threads = threads;
  return call;
}

// Where keys stand and how they are rotated there; `call` knows the keys.
void place_keys(AttendCall& call, const std::optional<Array<const float>>& key_center,
                const std::optional<Array<const int32_t>>& positions, const std::optional<Array<const float>>& inv_freq,
                float factor, bool interleaved) {
  require(positions.has_value() == inv_freq.has_value(), "positions and inv_freq together");
  if (positions) {
    const int64_t rows = positions->ndim() == 2 ? positions->shape(0) : 0;
    require(rows == 1 || rows == call.batch, "positions [B or 1, T]");
    require_shape(*positions, {rows, call.tokens}, "positions, not [B or 1, T]");
    require_dense(*positions, "positions");
    require(inv_freq->ndim() == 1 && 2 * static_cast<int64_t>(inv_freq->shape(0)) <= call.key.dim, "inv_freq [n], 2 n <= D");
    require_dense(*inv_freq, "inv_freq");
    call.positions = positions->data();
    call.positions_stride = rows == 1 ? 0 : call.tokens;
    call.inv_freq = inv_freq->data();
    call.rotary = inv_freq->shape(0);
    call.factor = factor;
    call.interleaved = interleaved;
  }
  if (key_center) {
    require(positions.has_value(), "a center comes with positions");
    require_shape(*key_center, {call.kv_heads, call.key.dim}, "center, not [G, D]");
    require_dense(*key_center, "center");
    call.center = key_center->data();
  }
}

void attend_codes(const Array<const float>& query, const Array<const uint8_t>& key_packed,
                  const Scale& key_scale, int key_bits, const Books& key_books,
                  const Array<const uint8_t>& value_packed, const Scale& value_scale, int value_bits,
                  const Books& value_books, const std::optional<Array<const float>>& key_center,
                  const std::optional<Array<const int32_t>>& positions, const std::optional<Array<const float>>& inv_freq, float factor, bool interleaved, const Mask& mask,
                  const std::optional<Array<const float>>& exact_keys, const std::optional<Array<const float>>& exact_values,
                  const Mask& exact_mask, bool half, float softmax_scale, float softcap, float skip, int threads,
                  const Array<float>& out, const Array<float>& lse) {
  require(key_packed.ndim() == 4, "packed codes [B, G, T, bytes]");
  AttendCall call{};
  call.batch = key_packed.shape(0), call.kv_heads = key_books.heads, call.tokens = key_packed.shape(2);
  require(value_books.heads == key_books.heads, "keys and values of one number of KV heads");
  call.key = coded_side(key_packed, key_scale, key_bits, key_books, call.batch, call.tokens);
  call.value = coded_side(value_packed, value_scale, value_bits, value_books, call.batch, call.tokens);
  place_keys(call, key_center, positions, inv_freq, factor, interleaved);
  call.half = half;
  call.softmax_scale = softmax_scale;
  call.softcap = softcap;
  call.skip = skip;
  call.threads = threads;
  place_query(call, query, mask);
  place_results(call, out, lse);
  require(exact_keys.has_value() == exact_values.has_value(), "exact keys and values together");
  std::optional<AttendCall> exact;
  if (exact_keys) {
    exact = exact_call(*exact_keys, *exact_values, half, softmax_scale, softcap, threads);
    require(exact->kv_heads == call.kv_heads && exact->value.dim == call.value.dim, "exact keys and values unlike the coded ones");
    place_query(*exact, query, exact_mask);
  }
  if (lse.size() == 0) return;
  nb::gil_scoped_release free;
  attend(call);
  if (exact) attend_too(*exact, call);
}

void attend_codes_in_pages(const Array<const float>& query, const Array<const int32_t>& table, const Array<const int32_t>& lengths,
                           const Array<const uint8_t>& key_packed, const Scale& key_scale, int key_bits, const Books& key_books,
                           const Array<const uint8_t>& value_packed, const Scale& value_scale, int value_bits,
                           const Books& value_books, const std::optional<Array<const float>>& key_center,
                           const std::optional<Array<const int32_t>>& positions,
                           const std::optional<Array<const float>>& inv_freq, float factor, bool interleaved, bool half,
                           float softmax_scale, float softcap, float skip, int threads, const Array<float>& out) {
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
  require_dense(query, "query");
  require_dense(out, "out");
  require_dense(lengths, "lengths");
  int64_t longest = 0;
  for (int64_t row = 0; row < call.rows; row++) {
    const int64_t length = lengths.data()[row];
    require(length >= 0 && length <= call.block * static_cast<int64_t>(table.shape(1)), "a row longer than its pages");
    longest = std::max(longest, length);
  }
  AttendCall& row = call.row;
  row.query = query.data(), row.out = out.data();
  row.batch = row.queries = 1, row.kv_heads = kv_heads, row.shared = heads / kv_heads;
  row.tokens = longest, row.key = call.key;
  place_keys(row, key_center, positions, inv_freq, factor, interleaved);
  row.half = half;
  row.softmax_scale = softmax_scale, row.softcap = softcap, row.skip = skip, row.threads = threads;
  call.table = table.data(), call.table_stride = table.stride(0), call.lengths = lengths.data();
  nb::gil_scoped_release free;
  attend_pages(call);
}

void attend_exact(const Array<const float>& query, const Array<const float>& keys, const Array<const float>& values,
                  const Mask& mask, bool half, float softmax_scale, float softcap, int threads, const Array<float>& out,
                  const Array<float>& lse) {
  AttendCall call = exact_call(keys, values, half, softmax_scale, softcap, threads);
  place_query(call, query, mask);
  place_results(call, out, lse);
  if (lse.size() == 0) return;
  nb::gil_scoped_release free;
  attend(call);
}

// Reads memory once and returns a sum of it: what no attention over that memory can be faster than.
uint64_t read_array(const Array<const uint8_t>& bytes, int threads) {
  require_dense(bytes, "bytes");
  constexpr int64_t kPiece = 1 << 20;
  const int64_t size = bytes.size(), pieces = (size + kPiece - 1) / kPiece;
  const uint8_t* data = bytes.data();
  std::atomic<uint64_t> total{0};
  nb::gil_scoped_release free;
  parallel_for(threads, pieces, [&](int64_t item) {
    const uint8_t *at = data + item * kPiece, *const end = data + std::min(size, (item + 1) * kPiece);
    uint64_t sums[32] = {};
    for (; at + 256 <= end; at += 256) {
      uint64_t words[32];
      std::memcpy(words, at, 256);
      for (int i = 0; i < 32; i++) sums[i] += words[i];
    }
    uint64_t sum = 0;
    for (uint64_t part : sums) sum += part;
    for (; at < end; at++) sum += *at;
    total += sum;
  });
  return total;
}

#if defined(__x86_64__) && defined(__linux__)
// Whether the CPU has a matrix unit for bfloat16 and the kernel lets this process use it.
bool amx_usable() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#else
bool amx_usable() { return false; }
#endif

bool supports(const std::string& isa) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "amx") {
    const bool bytes = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    static const bool usable = amx_usable();  // asked once: a virtual machine traps the question, 15 microseconds
    return avx512 && bytes && __builtin_cpu_supports("avx512bf16") && usable;
  }
#endif
  return isa == "portable";
}

}  // namespace
}  // namespace kvfold

NB_MODULE(KV_MODULE, m) {
  using namespace kvfold;
  nb::class_<Books>(m, "Books").def_prop_ro("heads", [](const Books& books) { return books.heads; });
  m.def("make_books", &make_books, "codebooks"_a, "book"_a, "channels"_a, nb::rv_policy::take_ownership);
  m.def("encode", &encode_arrays);
  m.def("code", &code_arrays, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg());
  m.def("decode", &decode_arrays);
  m.def("unrotate", &unrotate_arrays);
  m.def("attend_codes", &attend_codes, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(),
        nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  m.def("attend_pages", &attend_codes_in_pages, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  m.def("attend_exact", &attend_exact, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg());
  m.def("read", &read_array, "bytes"_a, "threads"_a);
  m.def("supports", &supports, "isa"_a, "Whether this CPU runs the module of that instruction set.");
}
