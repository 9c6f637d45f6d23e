// The CPU's matrix unit (AMX): its set-up for the life of an object. Compiled into the module of that instruction set alone, which
// is used only after the kernel gave this process leave (module.cpp, `supports`).
#pragma once

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include <cstdint>

namespace kvfold {

// Eight tiles of 16 rows of 64 bytes. The set-up belongs to the thread, and others (oneDNN) remember theirs: it is put back.
class AmxTiles {
 public:
  AmxTiles() {
    alignas(64) uint8_t own[64] = {};
    own[0] = 1;
    for (int tile = 0; tile < 8; tile++) {
      own[16 + 2 * tile] = 64;  // bytes a row
      own[48 + tile] = 16;      // rows
    }
    _tile_storeconfig(before_);
    _tile_loadconfig(own);
  }
  ~AmxTiles() { _tile_loadconfig(before_); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// The nearest bfloat16 of each float, and back.
inline __m256i to_bfloat16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline __m512 from_bfloat16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

}  // namespace kvfold

#endif
