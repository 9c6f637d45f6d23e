// Decoded keys and values as right factors of products on the CPU's matrix unit (attend_amx.h), made once for all query rows of a round.
#pragma once

#include "amx.h"
#include "attend_tiles.h"

#if defined(__AMX_BF16__)

namespace kvfold {

class AmxFactors {
 public:
  // Room for `tiles` of 64 tokens of every KV head.
  AmxFactors(const AttendCall& call, int64_t tiles)
      : key_order(call.key, call.positions ? &call : nullptr),
        value_order(call.value, nullptr),
        terms(call.half ? 1 : 2),
        key_parts(call.key.dim / 32),
        value_parts(call.value.dim / 16),
        call_(call),
        tiles_(tiles),
        keys_(call.batch * call.kv_heads * tiles * key_size()),
        values_(call.batch * call.kv_heads * tiles * value_size()),
        scales_(call.batch * call.kv_heads * tiles * 2 * kTile) {}

  const Order key_order, value_order;
  const int64_t terms;  // bfloat16 numbers a float32 is split into
  const int64_t key_parts, value_parts;

  // Of tile `tile`: [terms][parts of 32 channels][4 bunches of 16 keys][16 pairs of channels][16 keys][2].
  const uint16_t* keys(int64_t pair, int64_t tile) const { return keys_.data() + (pair * tiles_ + tile) * key_size(); }
  // [terms][parts of 16 channels][2 halves of the keys][16 pairs of keys][16 channels][2]
  const uint16_t* values(int64_t pair, int64_t tile) const { return values_.data() + (pair * tiles_ + tile) * value_size(); }
  // [keys, values][64]
  const float* scales(int64_t pair, int64_t tile) const { return scales_.data() + (pair * tiles_ + tile) * 2 * kTile; }

  // Tile `tile` of a KV head: `count` tokens from `first` on.
  void make(int64_t pair, int64_t tile, int64_t first, int64_t count) {
    static thread_local Aligned<float> decoded;
    decoded.resize(kTile * std::max(call_.key.dim, call_.value.dim));
    const int64_t place = pair * tiles_ + tile;
    float* const scale = &scales_[place * 2 * kTile];
    read(call_.key, key_order, pair, first, count, decoded.data(), scale);
    if (call_.positions) rotate_tile(call_, pair / call_.kv_heads, first, count, call_.key.dim, decoded.data());
    put_keys(decoded.data(), &keys_[place * key_size()]);
    read(call_.value, value_order, pair, first, count, decoded.data(), scale + kTile);
    put_values(decoded.data(), &values_[place * value_size()]);
  }

 private:
  int64_t key_size() const { return terms * key_parts * 4 * 512; }
  int64_t value_size() const { return terms * value_parts * 2 * 512; }

  // Vectors of one side and their scales, zeros behind the last.
  void read(const Side& side, const Order& order, int64_t pair, int64_t first, int64_t count, float* decoded, float* scales) const {
    static thread_local std::vector<uint16_t> codes;
    const int64_t b = pair / call_.kv_heads, g = pair % call_.kv_heads, dim = side.dim;
    if (side.books) {
      decode_tile(side, order, b, g, first, count, codes, decoded);
      read_scales(side, b, g, first, count, scales);
    } else {
      read_dense(side, b, g, first, count, decoded);
      std::fill_n(scales, count, 1.0f);
    }
    std::fill_n(decoded + count * dim, (kTile - count) * dim, 0.0f);
    std::fill_n(scales + count, kTile - count, 0.0f);
  }

  void put_keys(const float* decoded, uint16_t* to) const {
    const int64_t dim = call_.key.dim;
    for (int64_t t = 0; t < kTile; t++)
      for (int64_t i = 0; i < dim; i += 16) {
        __m512 x = _mm512_loadu_ps(decoded + t * dim + i);
        for (int64_t term = 0; term < terms; term++) {
          alignas(32) uint32_t pairs[8];
          const __m256i near = to_bfloat16(x);
          _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), near);
          uint16_t* tile = to + ((term * key_parts + i / 32) * 4 + t / 16) * 512;
          for (int64_t k = 0; k < 8; k++) std::memcpy(tile + (i % 32 / 2 + k) * 32 + t % 16 * 2, &pairs[k], 4);
          x = _mm512_sub_ps(x, from_bfloat16(near));
        }
      }
  }

  void put_values(const float* decoded, uint16_t* to) const {
    const int64_t dim = call_.value.dim;
    for (int64_t t = 0; t < kTile; t += 2)
      for (int64_t i = 0; i < dim; i += 16) {
        __m512 x = _mm512_loadu_ps(decoded + t * dim + i), y = _mm512_loadu_ps(decoded + (t + 1) * dim + i);
        for (int64_t term = 0; term < terms; term++) {
          const __m512i even = _mm512_cvtepu16_epi32(to_bfloat16(x)), odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bfloat16(y)), 16);
          uint16_t* tile = to + ((term * value_parts + i / 16) * 2 + t / 32) * 512;
          _mm512_storeu_si512(tile + t % 32 / 2 * 32, _mm512_or_si512(even, odd));
          x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(even, 16)));
          y = _mm512_sub_ps(y, _mm512_castsi512_ps(odd));
        }
      }
  }

  const AttendCall& call_;
  int64_t tiles_;
  Aligned<uint16_t> keys_, values_;
  Aligned<float> scales_;
};

}  // namespace kvfold

#endif
