// Scores of keys after RoPE: sums of entries of a table in shared memory, `q . codeword`, a key a thread.
#pragma once

#include "step_parts.cuh"

// The first of the rows whose softmaxes a thread holds after `score`, and how many.
DEVICE int first_of(int lane) { return lane == 0 ? 0 : ROWS; }
constexpr int HELD = ROWS;

// Logits of this block's keys, and their softmaxes over each warp, in its first thread.
DEVICE void score(const Step& step, const Place& place, Both* both) {
    constexpr int HALVES = (ROWS + 1) / 2, ENTRIES = K_BYTES * K_SIZE * ROWS;
    u16* table = reinterpret_cast<u16*>(shared);
    const u16* from = step.tables + i64(place.pair) * (K_BYTES * K_SIZE * TALL) + place.first_row;
    if constexpr (ROWS == TALL && ENTRIES % 8 == 0) {
        for (int at = threadIdx.x; at < ENTRIES / 8; at += THREADS) shared[at] = reinterpret_cast<const uint4*>(from)[at];
    } else {
        for (int at = threadIdx.x; at < ENTRIES; at += THREADS) table[at] = from[at / ROWS * TALL + at % ROWS];
    }
    const u8* codes_of = place.codes(step.keys);
    u32 next[K_BYTES / 4];  // asked for before they are needed: a block has too few warps to wait
    load_codes<K_BYTES, K_LOAD>(codes_of + min(place.first + int(threadIdx.x), place.last - 1) * step.keys.codes_t, next);
    __syncthreads();
    for (int token = place.first + threadIdx.x; token < place.last; token += THREADS) {
        u32 codes[K_BYTES / 4];
#pragma unroll
        for (int j = 0; j < K_BYTES / 4; ++j) codes[j] = next[j];
        load_codes<K_BYTES, K_LOAD>(codes_of + min(token + THREADS, place.last - 1) * step.keys.codes_t, next);
        const K_SCALE key_scale = place.scale(step.keys, token);
        const V_SCALE value_scale = place.scale(step.values, token);
        float sums[2 * HALVES] = {};
#pragma unroll
        for (int four = 0; four < K_BYTES; four += 4) {
            u32 sum[HALVES] = {};
#pragma unroll
            for (int index = four; index < four + 4; ++index) {
                const u16* entry = table + index * (K_SIZE * ROWS) + code_of<K_SIZE>(codes, index) * ROWS;
                if constexpr (ROWS == 4) {
                    const uint2 rows = *reinterpret_cast<const uint2*>(entry);
                    sum[0] = add2(sum[0], rows.x), sum[1] = add2(sum[1], rows.y);
                } else if constexpr (ROWS == 2) {
                    sum[0] = add2(sum[0], *reinterpret_cast<const u32*>(entry));
                } else {
                    sum[0] = add2(sum[0], *entry);
                }
            }
#pragma unroll
            for (int j = 0; j < HALVES; ++j) sums[2 * j] += low(sum[j]), sums[2 * j + 1] += high(sum[j]);
        }
        const float scale = scale_of(key_scale), log_scale = log2_of(scale_of(value_scale));
        float* kept = place.logits(step, token);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            if (place.first_row + row >= step.rows) break;
            float product = sums[row] * scale;
#if MORE
            product += kept[row];
#endif
            both[row].add(product, log_scale, step, place, row, token, kept);
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) both[row].across(lanes);
}
