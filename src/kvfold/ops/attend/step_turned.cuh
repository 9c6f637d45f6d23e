// Scores of keys before RoPE: sums of codewords, turned, times queries on tensor cores.
//
// A warp sums the codewords of 16 keys, four threads a key, right where tensor cores want them: a thread's 8 channels of a group
// are its part of both factors of a product, in whatever order, since the queries' are in the same. Codewords of 64 bytes collide
// in the banks of shared memory every other time, unless they stand twice and odd keys read the second copy.
//
// q . R(n + e) k = sum_c k[c] (a[c] cos((n + e) f) + b[c] sin((n + e) f)); n is the position of the first of 8 keys, of which
// `turns` has cosines and sines; those of the distances e from it, 0 to 7, stay in registers.
#pragma once

#include "step_parts.cuh"

// Cosine and sine as float16, low and high; 2 pi is taken off in two parts.
DEVICE u32 turn_of(float angle) {
    const float turns = rintf(angle * 0.15915494309189535f);
    float sine, cosine;
    small_sincos(fmaf(turns, 1.7484556e-7f, fmaf(turns, -6.2831855f, angle)), &sine, &cosine);
    return pack2(cosine, sine);
}

extern "C" __global__ void turns(const __grid_constant__ Step step) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x, eighths = (step.tokens + 7) / 8;
    if (at >= step.batches * eighths * WIDTH) return;
    const int channel = at % WIDTH, start = at / WIDTH % eighths * 8;
    const POSITION* from = step.positions + at / WIDTH / eighths * step.positions_b + start;
    const u32 both = turn_of(float(from[0]) * step.frequency[channel]);
    u16* row = step.turns + at / WIDTH * 2 * WIDTH + channel;
    row[0] = u16(both);
    row[WIDTH] = u16(both >> 16);
    if (channel > 0) return;
    bool all = true;
    for (int next = 1; next < min(8, step.tokens - start); ++next) all = all && from[next] == from[0] + next;
    step.consecutive[at / WIDTH] = all;
}

// What a thread knows for all its keys, of its 8 channels of every group.
struct Turned {
    u32 cosine[K_GROUPS][4], sine[K_GROUPS][4];  // of the distance of its key from the first of 8
    const uint4* rows;                           // factors of the row that has the number of its key, [2, K_GROUPS, 4 ROWS]
    u32 once, twice;                             // addresses in shared memory of codewords
    const u16* turns;
};

// A step is one of a thread's two keys in one group. What it needs is asked for one (codewords) or two (turns) steps ahead.
constexpr int STEPS = 2 * K_GROUPS;

struct Turn {
    uint4 cosine, sine;
    DEVICE void load(const Turned& turned, const int* eighth, int number) {
        const i64 at = i64(eighth[number % 2]) * 2 * WIDTH + number / 2 * DIM;
        const uint4* from = reinterpret_cast<const uint4*>(turned.turns + at);
        cosine = __ldg(from + threadIdx.x % 4), sine = __ldg(from + WIDTH / 8 + threadIdx.x % 4);
    }
};

struct Words {
    u32 word[K_STAGES][4];
    // Codewords of a group, this thread's 8 channels of them, from shared memory.
    template <int STAGE = 0>
    DEVICE void load(const Turned& turned, const u32* codes, int group) {
        if constexpr (STAGE < K_STAGES) {
            constexpr int ROW = DIM * 2, TABLE = K_SIZE * ROW, COPIES = STAGE < TWICE ? 2 : 1;
            const u32 code = code_of<K_SIZE>(codes, STAGE * K_GROUPS + group);
            read_four<(STAGE < TWICE ? 2 * STAGE : STAGE + TWICE) * TABLE>(
                (STAGE < TWICE ? turned.twice : turned.once) + code * (COPIES * ROW), word[STAGE]);
            load<STAGE + 1>(turned, codes, group);
        }
    }
    DEVICE u32 sum(int j) const {
        u32 all = word[0][j];
#pragma unroll
        for (int stage = 1; stage < K_STAGES; ++stage) all = add2(all, word[stage][j]);
        return all;
    }
};

DEVICE void multiply_group(float* sums, const u32 (*with_a)[4], const u32 (*with_b)[4], const uint4& a, const uint4& b) {
    multiply(sums, with_a[0], with_a[1], a.x, a.y), multiply(sums, with_a[0] + 2, with_a[1] + 2, a.z, a.w);
    multiply(sums, with_b[0], with_b[1], b.x, b.y), multiply(sums, with_b[0] + 2, with_b[1] + 2, b.z, b.w);
}

// Products of rows and 16 keys whose positions do not go on one by one, or whose groups have codebooks of their own.
DEVICE void multiply_any(const Step& step, const Place& place, const uint4* rows, const POSITION* positions, int start,
                         float* sums) {
    const int lane = threadIdx.x % 32, key = lane / 4, part = lane % 4;
#pragma unroll 1
    for (int group = 0; group < K_GROUPS; ++group) {
        u32 with_a[2][4], with_b[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = min(start + 8 * half + key, place.last - 1);
            const u8* codes = place.codes(step.keys) + token * step.keys.codes_t + group;
            u32 sum[4] = {};
#pragma unroll 1
            for (int stage = 0; stage < K_STAGES; ++stage) {
                const int code = min(int(codes[stage * K_GROUPS]), K_SIZE - 1);
                const i64 word = place.book<K_GROUPS>(step.keys, stage, group) * K_SIZE + code;
                const uint4 four = __ldg(reinterpret_cast<const uint4*>(step.keys.codebooks + word * DIM) + part);
                sum[0] = add2(sum[0], four.x), sum[1] = add2(sum[1], four.y);
                sum[2] = add2(sum[2], four.z), sum[3] = add2(sum[3], four.w);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float* f = step.frequency + group * DIM + part * 8 + j * 2;
                const u32 even = turn_of(float(positions[token]) * f[0]), odd = turn_of(float(positions[token]) * f[1]);
                with_a[half][j] = mul2(sum[j], __byte_perm(even, odd, 0x5410));
                with_b[half][j] = mul2(sum[j], __byte_perm(even, odd, 0x7632));
            }
        }
        const uint4* of_row = rows + group * 4 * ROWS + lane % (4 * ROWS);
        multiply_group(sums, with_a, with_b, of_row[0], of_row[K_GROUPS * 4 * ROWS]);
    }
}

// Writes the codebooks of this block's head to shared memory, and the factors of its rows; whether all groups share codebooks.
DEVICE bool prepare(const Step& step, const Place& place, uint4* factors) {
    constexpr int ROW = DIM * 2 / 16, TABLE = K_SIZE * ROW;
    for (int at = threadIdx.x; at < 2 * K_GROUPS * ROWS * 16; at += THREADS) {
        const int two = at % 4, part = at / 4 % 4, row = place.first_row + at / 16 % ROWS, group = at / 16 / ROWS % K_GROUPS;
        const i64 of_row = ((1 + at / 16 / ROWS / K_GROUPS) * i64(place.pairs) + place.pair) * step.rows + row;
        const float* from = step.turning + of_row * WIDTH + group * DIM + part * 8 + two * 2;
        reinterpret_cast<u32*>(factors)[at] = row < step.rows ? pack2(from[0], from[1]) : 0;
    }
    for (int at = threadIdx.x; at < K_STAGES * TABLE; at += THREADS) {
        const int stage = at / TABLE, word = at % TABLE / ROW, entry = at % ROW;
        const u16* table = step.keys.codebooks + place.book<K_GROUPS>(step.keys, stage, 0) * K_SIZE * DIM;
        const uint4 value = __ldg(reinterpret_cast<const uint4*>(table) + at % TABLE);
        if (stage < TWICE) {
            uint4* target = shared + stage * 2 * TABLE + word * 2 * ROW + entry;
            target[0] = target[ROW] = value;
        } else {
            shared[(stage + TWICE) * TABLE + at % TABLE] = value;
        }
    }
    bool same = true;
    for (int at = threadIdx.x; at < K_BYTES; at += THREADS) {
        const int stage = at / K_GROUPS;
        same = same && place.book<K_GROUPS>(step.keys, stage, at % K_GROUPS) == place.book<K_GROUPS>(step.keys, stage, 0);
    }
    return __syncthreads_and(same);
}

// The first of the rows whose softmaxes a thread holds after `score`, and how many.
DEVICE int first_of(int lane) { return min(2 * lane, ROWS); }
constexpr int HELD = ROWS < 2 ? ROWS : 2;

// Logits of this block's keys, and their softmaxes over each warp, two rows a thread in the first ones.
DEVICE void score(const Step& step, const Place& place, Both* both) {
    __shared__ uint4 factors[2 * K_GROUPS * 4 * ROWS];  // of a product: a row's 8 channels
    const bool same = prepare(step, place, factors);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, key = lane / 4, part = lane % 4;
    const int last = place.last, ends = (last - 1) / 8;
    const u8* codes_of = place.codes(step.keys);
    const POSITION* positions = step.positions + place.batch * step.positions_b;
    const u8* consecutive = step.consecutive + place.batch * step.eighths_b;
    Turned turned;
    turned.once = address_of(shared) + part * 16, turned.twice = turned.once + key % 2 * 64;
    turned.turns = step.turns + place.batch * step.eighths_b * 2 * WIDTH, turned.rows = factors + lane;
#pragma unroll
    for (int group = 0; group < K_GROUPS; ++group)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* f = step.frequency + group * DIM + part * 8 + j * 2;
            const u32 even = turn_of(key * f[0]), odd = turn_of(key * f[1]);
            turned.cosine[group][j] = __byte_perm(even, odd, 0x5410), turned.sine[group][j] = __byte_perm(even, odd, 0x7632);
        }
    u32 codes[2][K_BYTES / 4];
    u8 in_order[2];
    auto ask = [&](int start) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load_codes<K_BYTES, K_LOAD>(codes_of + min(start + 8 * half + key, last - 1) * step.keys.codes_t, codes[half]);
            in_order[half] = consecutive[min(start / 8 + half, ends)];
        }
    };
    Words words[2];
    Turn turn[3];
    int start = place.first + 16 * warp, eighth[2] = {min(start / 8, ends), min(start / 8 + 1, ends)};
    if (start < last) {
        ask(start);
        turn[0].load(turned, eighth, 0), turn[1].load(turned, eighth, 1);
        words[0].load(turned, codes[0], 0);
    }
    for (; start < last; start += 16 * WARPS) {
        const bool fast = same && in_order[0] && in_order[1];
        K_SCALE key_scale[2];
        V_SCALE value_scale[2];
        u32 current[2][K_BYTES / 4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = min(start + 8 * half + key, last - 1);
            key_scale[half] = place.scale(step.keys, token), value_scale[half] = place.scale(step.values, token);
#pragma unroll
            for (int j = 0; j < K_BYTES / 4; ++j) current[half][j] = codes[half][j];
        }
        const int next = start + 16 * WARPS < last ? start + 16 * WARPS : start;
        ask(next);
        float sums[4] = {};
        if (fast) {
            u32 with_a[2][4], with_b[2][4];
#pragma unroll
            for (int number = 0; number < STEPS; ++number) {
                const int group = number / 2, half = number % 2;
                if (number + 1 < STEPS) words[(number + 1) % 2].load(turned, current[(number + 1) % 2], (number + 1) / 2);
                if (number + 2 < STEPS) turn[(number + 2) % 3].load(turned, eighth, number + 2);
                const Turn& here = turn[number % 3];
                const u32 c[4] = {here.cosine.x, here.cosine.y, here.cosine.z, here.cosine.w};
                const u32 s[4] = {here.sine.x, here.sine.y, here.sine.z, here.sine.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const u32 cosine = fma2(c[j], turned.cosine[group][j], minus2(mul2(s[j], turned.sine[group][j])));
                    const u32 sine = fma2(s[j], turned.cosine[group][j], mul2(c[j], turned.sine[group][j]));
                    const u32 sum = words[number % 2].sum(j);
                    with_a[half][j] = mul2(sum, cosine), with_b[half][j] = mul2(sum, sine);
                }
                if (half == 0) continue;
                uint4 a, b;  // of rows that do not exist, anything
                set_to_anything(a), set_to_anything(b);
                if (key < ROWS) a = turned.rows[group * 4 * ROWS], b = turned.rows[(K_GROUPS + group) * 4 * ROWS];
                multiply_group(sums, with_a, with_b, a, b);
            }
        } else {
            multiply_any(step, place, factors, positions, start, sums);
        }
        words[0].load(turned, codes[0], 0);
        eighth[0] = min(next / 8, ends), eighth[1] = min(next / 8 + 1, ends);
        turn[0].load(turned, eighth, 0), turn[1].load(turned, eighth, 1);
        if (2 * part >= ROWS) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = start + 8 * half + key;
            if (token >= last) break;
            const float scale = scale_of(key_scale[half]), log_scale = log2_of(scale_of(value_scale[half]));
#pragma unroll
            for (int j = 0; j < HELD; ++j) {
                const int row = 2 * part + j;
                if (place.first_row + row >= step.rows) break;
                both[j].add(sums[2 * half + j] * scale, log_scale, step, place, row, token, place.logits(step, token));
            }
        }
    }
#pragma unroll
    for (int j = 0; j < HELD; ++j)
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) both[j].across(lanes);
}
