// Coding in the Python module.
#include "module.h"

namespace kvfold {
namespace {

using Vectors = nb::ndarray<nb::ro, nb::device::cpu>;  // float32 or bfloat16
using Scale = nb::ndarray<nb::device::cpu>;            // float16, or uint8, the upper bits of them

// Vectors [B, G, T, D] and how they are searched; where results go is not known yet.
CodeCall searched(const Vectors& x, const Books& books, const Array<const int64_t>& channels,
                  const std::optional<Array<const float>>& weights, int bits, int64_t beam) {
  require(x.ndim() == 4, "vectors [B, G, T, D]");
  const int64_t batch = x.shape(0), tokens = x.shape(2), width = books.head_dim();
  require_shape(x, {batch, books.heads, tokens, width}, "vectors, not [B, G, T, D] of the books");
  require(x.size() == 0 || x.stride(3) == 1, "vectors with gaps within a token");
  const bool half = is_bfloat16(x.dtype());
  require(half || x.dtype() == nb::dtype<float>(), "vectors of float32 or bfloat16");
  require(bits >= 1 && bits <= 16 && books.size <= int64_t{1} << bits, "codes of 1 to 16 bits that number all codewords");
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
  scaling.x = x.data(), scaling.half = half, scaling.channels = channels.data();
  scaling.batch = batch, scaling.heads = books.heads, scaling.tokens = tokens, scaling.groups = books.groups, scaling.dim = books.dim;
  scaling.batch_stride = x.stride(0), scaling.head_stride = x.stride(1), scaling.token_stride = x.stride(2);
  return {scaling, {}, bits, beam, &books};
}

// Results of `call` in [N, G, T, ..] rows.
void place(CodeCall& call, const Array<uint8_t>& packed, const Scale& scale, int64_t rows, int64_t tokens) {
  const int64_t bytes = (call.books->codes() * call.bits + 7) / 8;
  require_shape(packed, {rows, call.books->heads, tokens, bytes}, "packed codes, not [B, G, T, bytes]");
  require(packed.size() == 0 || bytes == 1 || packed.stride(3) == 1, "packed codes have gaps within a token");
  require_shape(scale, {rows, call.books->heads, tokens, 1}, "scale, not [B, G, T, 1]");
  Stored& to = call.to;
  to.short_scale = scale.dtype() == nb::dtype<uint8_t>();
  require(to.short_scale || is_half(scale.dtype()), "scale of uint8 or float16");
  to.packed = packed.data(), to.scale = scale.data();
  to.batch_stride = packed.stride(0), to.head_stride = packed.stride(1), to.token_stride = packed.stride(2);
  to.scale_batch_stride = scale.stride(0), to.scale_head_stride = scale.stride(1), to.scale_token_stride = scale.stride(2);
}

void code_arrays(const Vectors& x, const Books& books, const Array<const int64_t>& channels,
                 const std::optional<Array<const float>>& weights, int bits, int64_t beam, int threads,
                 const Array<uint8_t>& packed, const Scale& scale) {
  CodeCall call = searched(x, books, channels, weights, bits, beam);
  place(call, packed, scale, call.scaling.batch, call.scaling.tokens);
  nb::gil_scoped_release free;
  code(&call, 1, false, threads);
}

void code_in_pages(const Array<const int64_t>& slots, const std::optional<Array<const int32_t>>& positions,
                   const std::optional<Array<const float>>& inv_freq, float factor, bool interleaved, int threads,
                   const Vectors& keys, const Books& key_books, const Array<const int64_t>& key_channels,
                   const std::optional<Array<const float>>& key_weights, int key_bits, int64_t key_beam,
                   const Array<uint8_t>& key_packed, const Scale& key_scale, const Vectors& values, const Books& value_books,
                   const Array<const int64_t>& value_channels, const std::optional<Array<const float>>& value_weights,
                   int value_bits, int64_t value_beam, const Array<uint8_t>& value_packed, const Scale& value_scale) {
  CodeCall calls[2] = {searched(keys, key_books, key_channels, key_weights, key_bits, key_beam),
                       searched(values, value_books, value_channels, value_weights, value_bits, value_beam)};
  const int64_t tokens = slots.ndim() == 1 ? slots.shape(0) : -1;
  require(key_packed.ndim() == 4, "packed codes [N, G, block, bytes]");
  const int64_t pages = key_packed.shape(0), block = key_packed.shape(2);
  place(calls[0], key_packed, key_scale, pages, block);
  place(calls[1], value_packed, value_scale, pages, block);
  require_dense(slots, "slots");
  for (int64_t t = 0; t < tokens; t++) require(slots.data()[t] < pages * block, "a page that is not there");
  for (CodeCall& call : calls) {
    require(call.scaling.batch == 1 && call.scaling.tokens == tokens, "keys and values [1, G, T, D] and slots [T]");
    call.to.slots = slots.data(), call.to.block = block;
  }
  require(positions.has_value() == inv_freq.has_value(), "positions and inv_freq together");
  if (positions) calls[0].scaling.turn = turn_of(*positions, *inv_freq, factor, interleaved, 1, tokens, key_books.head_dim());
  nb::gil_scoped_release free;
  code(calls, 2, true, threads);
}

}  // namespace

void bind_coding(nb::module_& m) {
  m.def("code", &code_arrays, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg());
  m.def("code_pages", &code_in_pages, nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
}

}  // namespace kvfold
