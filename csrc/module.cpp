// The Python module: checks shapes, finds pointers, releases the GIL. Compiled once an instruction set, as a module each:
// code that the linker might share between instruction sets would stop an older CPU.
#include "module.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "pool.h"

namespace kvfold {
namespace {

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
  require(x.ndim() == 4, "keys [B, G, T, D]");
  const int64_t batch = x.shape(0), heads = x.shape(1), tokens = x.shape(2), dim = x.shape(3);
  const Turn turn = turn_of(positions, inv_freq, factor, interleaved, batch, tokens, dim);
  require(x.size() == 0 || x.stride(3) == 1, "keys with gaps within a token");
  require_shape(out, {batch, heads, tokens, dim}, "out, not that of the keys");
  require_dense(out, "out");
  const RopeCall call{x.data(), out.data(), batch, heads, tokens, dim, x.stride(0), x.stride(1), x.stride(2), turn, threads};
  nb::gil_scoped_release free;
  unrotate(call);
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
  using namespace nb::literals;
  nb::class_<Books>(m, "Books").def_prop_ro("heads", [](const Books& books) { return books.heads; });
  m.def("make_books", &make_books, "codebooks"_a, "book"_a, "channels"_a, nb::rv_policy::take_ownership);
  m.def("encode", &encode_arrays);
  m.def("decode", &decode_arrays);
  m.def("unrotate", &unrotate_arrays);
  bind_coding(m);
  bind_attention(m);
  m.def("read", &read_array, "bytes"_a, "threads"_a);
  m.def("supports", &supports, "isa"_a, "Whether this CPU runs the module of that instruction set.");
}
