// What the parts of step.cu share: what a launch is told, codes, the softmax so far.
#pragma once

constexpr int DIM = 32, THREADS = 32 * WARPS;
constexpr int K_BYTES = K_STAGES * K_GROUPS, V_BYTES = V_STAGES * V_GROUPS, WIDTH = K_GROUPS * DIM;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f, UNIT = 1073741824.0f;

template <class SCALE>
struct Side {
    const u8* codes;
    const SCALE* scale;
    i64 codes_b, codes_g, codes_t, scale_b, scale_g, scale_t;
    const u16* codebooks;
    const i64* book;
};

// What a launch is told; gpu_cuda.py has the same in the same order.
struct Step {
    Side<K_SCALE> keys;
    Side<V_SCALE> values;
    const u8* mask;
    i64 mask_b, mask_q, mask_t;
    const float *turning, *frequency;            // [3, B G, rows, WIDTH]: queries, factors of cosines, of sines; [WIDTH]
    const POSITION* positions;                   // [B or 1, T]
    i64 positions_b;
    u16* turns;                                  // [B or 1, ceil(T / 8), 2, WIDTH], cosines and sines at every eighth key
    u8* consecutive;                             // [B or 1, ceil(T / 8)], whether positions go on from there one by one
    i64 eighths_b;
    const u16* tables;                           // [B G, K_BYTES, K_SIZE, TALL]
    float *logits, *out, *lse;                   // [B G, T, TALL], [splits, B G, rows, V_GROUPS * DIM], [splits, B G, rows]
    float softmax_scale, softcap;
    int heads, rows, queries, tokens, each;      // KV heads; query rows of one; queries; keys, and those of a split
    int batches;                                 // of positions
};

// Where a thread block works.
struct Place {
    int pair, pairs, heads, batch, head, first_row, first, last;
    DEVICE explicit Place(const Step& step)
        : pair(blockIdx.y), pairs(gridDim.y), heads(step.heads), batch(pair / heads), head(pair % heads),
          first_row(blockIdx.z * ROWS), first(blockIdx.x * step.each), last(min(first + step.each, step.tokens)) {}
    template <class SCALE>
    DEVICE const u8* codes(const Side<SCALE>& side) const {
        return side.codes + batch * side.codes_b + head * side.codes_g;
    }
    template <class SCALE>
    DEVICE SCALE scale(const Side<SCALE>& side, int token) const {
        return side.scale[batch * side.scale_b + head * side.scale_g + token * side.scale_t];
    }
    // Which codebook a stage of a group uses.
    template <int GROUPS, class SCALE>
    DEVICE i64 book(const Side<SCALE>& side, int stage, int group) const {
        return side.book[(stage * heads + head) * GROUPS + group];
    }
    DEVICE float* logits(const Step& step, int token) const {
        return step.logits + (i64(pair) * step.tokens + token) * TALL + first_row;
    }
};

DEVICE float low(u32 a) { return half_of(u16(a)); }
DEVICE float high(u32 a) { return half_of(u16(a >> 16)); }
DEVICE float scale_of(u16 a) { return half_of(a); }
DEVICE float scale_of(u8 a) { return half_of(u16(a) << 7); }

// Byte `index` of packed codes; one that names no codeword names the last.
template <int SIZE>
DEVICE u32 code_of(const u32* codes, int index) {
    const u32 code = __byte_perm(codes[index / 4], 0, 0x4440 | (index % 4));
    return SIZE < 256 ? min(code, u32(SIZE - 1)) : code;
}

template <int BYTES, int LOAD>
DEVICE void load_codes(const u8* from, u32* codes) {
#pragma unroll
    for (int at = 0; at < BYTES; at += LOAD) {
        if constexpr (LOAD == 16) {
            const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from + at));
            codes[at / 4] = four.x, codes[at / 4 + 1] = four.y, codes[at / 4 + 2] = four.z, codes[at / 4 + 3] = four.w;
        } else if constexpr (LOAD == 8) {
            const uint2 two = __ldcs(reinterpret_cast<const uint2*>(from + at));
            codes[at / 4] = two.x, codes[at / 4 + 1] = two.y;
        } else {
            codes[at / 4] = __ldcs(reinterpret_cast<const u32*>(from + at));
        }
    }
}

// Maximum and sum of 2^(logit - maximum) over logits so far, {LEAST, 0} at first: finite, so that minus infinity less the maximum
// is a number. NaN stays, in the sum.
constexpr float LEAST = -1e30f;
struct Softmax {
    float top, sum;
    DEVICE void join(float other_top, float other_sum) {
        const float higher = fmaxf(top, other_top);
        sum = sum * exp2_of(top - higher) + other_sum * exp2_of(other_top - higher);
        top = higher;
    }
    DEVICE void add(float logit) { join(logit, 1); }
    DEVICE void across(int lanes) {
        const float other_top = __shfl_xor_sync(~0u, top, lanes), other_sum = __shfl_xor_sync(~0u, sum, lanes);
        join(other_top, other_sum);
    }
};

// A row's softmaxes: of logits, and of logits plus the logarithm of the value's scale.
struct Both {
    Softmax plain, scaled;
    // Adds the logit of `score`, in powers of 2 (none where the mask says no), and keeps what the second softmax is of.
    DEVICE void add(float score, float log_scale, const Step& step, const Place& place, int row, int token, float* kept) {
        float logit = score * step.softmax_scale;
#if CAPPED
        logit = step.softcap * tanhf(logit / step.softcap);
#endif
        logit *= LOG2E;
#if MASKED
        const i64 at = place.batch * step.mask_b + (place.first_row + row) % step.queries * step.mask_q + token * step.mask_t;
        if (!step.mask[at]) logit = NOTHING;
#endif
        plain.add(logit);
        scaled.add(logit + log_scale);
        kept[row] = logit + log_scale;
    }
    DEVICE void across(int lanes) { plain.across(lanes), scaled.across(lanes); }
};
