// The CPU's matrix unit (AMX): whether it may be used, and its set-up for the life of an object.
#pragma once

#if defined(__AVX512F__) && defined(__linux__) && defined(__x86_64__)
#define KVFOLD_AMX 1

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#define KVFOLD_AMX_CODE __attribute__((target("amx-tile,amx-bf16")))

namespace kvfold {

// Whether the CPU has the unit and the kernel lets this process use it.
inline bool amx_usable() {
  static const bool usable = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return usable;
}

// Eight tiles of 16 rows of 64 bytes. The set-up belongs to the thread, and others (oneDNN) remember theirs: it is put back.
class AmxTiles {
 public:
  KVFOLD_AMX_CODE AmxTiles() {
    alignas(64) uint8_t own[64] = {};
    own[0] = 1;
    for (int tile = 0; tile < 8; tile++) {
      own[16 + 2 * tile] = 64;  // bytes a row
      own[48 + tile] = 16;      // rows
    }
    _tile_storeconfig(before_);
    _tile_loadconfig(own);
  }
  KVFOLD_AMX_CODE ~AmxTiles() { _tile_loadconfig(before_); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// The nearest bfloat16 of each float, in the upper half of its 32 bits, zeros below.
inline __m512i nearest_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

}  // namespace kvfold

#endif
