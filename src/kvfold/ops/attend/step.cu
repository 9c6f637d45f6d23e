// A decode step's attention on residual codes for NVIDIA GPUs, one thread block a split of a KV head's keys.
//
// Compiled when first used (gpu_cuda.py) for one form of codes; these names are given then:
//   K_STAGES K_GROUPS K_SIZE, V_STAGES V_GROUPS V_SIZE   codes of a byte, groups of 32 channels, float16 codewords
//   ROWS     query rows of a block: 1, 2 or 4            TALL   rows of a KV head, a power of 2
//   TURNED   keys before RoPE; otherwise scores come from tables      TWICE  stages whose codewords stand twice
//   POSITION type of a position: int or i64
//   MORE     logits hold what a rotated center adds      MASKED, CAPPED
//   K_SCALE, V_SCALE   type of a scale: u16 (float16) or u8 (its upper half)
//   K_LOAD, V_LOAD     bytes of a load of codes: 4, 8 or 16, as they are aligned      WARPS  of a block
//
// 1. Logits, to memory, with their maximum and sum, and those of logits plus the logarithm of the value's scale
//    (step_tables.cuh, step_turned.cuh).
// 2. Each key adds its weight to the masses of its value's codewords: integers in shared memory, 2^30 a sum of weights, so that
//    no order of additions changes the result.
// 3. Masses times codewords, float32.

#include "step_ptx.cuh"
#include "step_parts.cuh"
#if TURNED
#include "step_turned.cuh"
#else
#include "step_tables.cuh"
#endif

// Adds a row's weight to the masses, [V_BYTES, V_SIZE, ROWS] from `mine` on, of the codewords of a value.
template <int INDEX>
DEVICE void add_masses(const u32* codes, u32 mine, int weight) {
    if constexpr (INDEX < V_BYTES) {
        add_to<INDEX * V_SIZE * ROWS * 4>(mine + code_of<V_SIZE>(codes, INDEX) * (4 * ROWS), weight);
        add_masses<INDEX + 1>(codes, mine, weight);
    }
}

// Adds the weights of all keys, 2^(logit + base), to the masses.
DEVICE void add_keys(const Step& step, const Place& place, int* masses, int row, float base) {
    constexpr int TOGETHER = WARPS * (32 / ROWS);
    const u8* codes_of = place.codes(step.values);
    const u32 mine = address_of(masses + row);
    struct {
        u32 codes[V_BYTES / 4];
        float logit;
    } asked[2];  // for before they are needed: a block has too few warps to wait
    auto ask = [&](int turn, int token) {
        token = min(token, place.last - 1);
        load_codes<V_BYTES, V_LOAD>(codes_of + token * step.values.codes_t, asked[turn].codes);
        asked[turn].logit = __ldcs(place.logits(step, token) + row);
    };
    const int own = place.first + threadIdx.x / ROWS;
    ask(0, own), ask(1, own + TOGETHER);
    for (int start = own; start < place.last; start += 2 * TOGETHER) {
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
            const int token = start + turn * TOGETHER;
            const int weight = token < place.last ? __float2int_rn(exp2_of(asked[turn].logit + base)) : 0;
            if (weight != 0) add_masses<0>(asked[turn].codes, mine, weight);
            ask(turn, token + 2 * TOGETHER);
        }
    }
}

// Masses times codewords, float32 [V_BYTES, ROWS, DIM]: a warp takes a code, and a thread 8 channels of every eighth codeword.
DEVICE void multiply_masses(const Step& step, const Place& place, const int* masses, float* parts) {
    const int word_of = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
    for (int index = threadIdx.x / 32; index < V_BYTES; index += WARPS) {
        const i64 table = place.book<V_GROUPS>(step.values, index / V_GROUPS, index % V_GROUPS);
        const uint4* words = reinterpret_cast<const uint4*>(step.values.codebooks + table * V_SIZE * DIM) + part;
        float sum[ROWS][8] = {};
#pragma unroll 4
        for (int word = word_of; word < V_SIZE; word += 8) {
            const uint4 channels = __ldg(words + word * 4);
            const u32 two[4] = {channels.x, channels.y, channels.z, channels.w};
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                const float mass = float(masses[(index * V_SIZE + word) * ROWS + row]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sum[row][2 * j] += mass * low(two[j]);
                    sum[row][2 * j + 1] += mass * high(two[j]);
                }
            }
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2) sum[row][j] += __shfl_xor_sync(~0u, sum[row][j], lanes);
                if (word_of == 0) parts[(index * ROWS + row) * DIM + part * 8 + j] = sum[row][j];
            }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) step(const __grid_constant__ Step step) {
    __shared__ Softmax of_warps[WARPS][ROWS][2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Place place(step);
    Both both[HELD];
    for (int held = 0; held < HELD; ++held) both[held] = {{LEAST, 0}, {LEAST, 0}};
    score(step, place, both);
    if (first_of(lane) < ROWS)
        for (int held = 0; held < HELD; ++held) {
            of_warps[warp][first_of(lane) + held][0] = both[held].plain;
            of_warps[warp][first_of(lane) + held][1] = both[held].scaled;
        }
    __syncthreads();  // logits of the block are in memory, and nobody reads tables or codewords any more

    auto of_all = [&](int row, int which) {
        Softmax all = {LEAST, 0};
        for (int other = 0; other < WARPS; ++other) all.join(of_warps[other][row][which].top, of_warps[other][row][which].sum);
        return all;
    };
    int* masses = reinterpret_cast<int*>(shared);
    float* parts = reinterpret_cast<float*>(masses + V_BYTES * V_SIZE * ROWS);
    for (int at = threadIdx.x; at < V_BYTES * V_SIZE * ROWS / 4; at += THREADS) shared[at] = uint4{0, 0, 0, 0};
    const Softmax mine = of_all(lane % ROWS, 1);
    __syncthreads();
    if (place.first_row + lane % ROWS < step.rows)
        add_keys(step, place, masses, lane % ROWS, mine.sum > 0 ? log2_of(UNIT) - mine.top - log2_of(mine.sum) : NOTHING);
    __syncthreads();
    multiply_masses(step, place, masses, parts);
    __syncthreads();

    for (int at = threadIdx.x; at < ROWS * V_GROUPS * DIM; at += THREADS) {
        const int row = at / (V_GROUPS * DIM), group = at / DIM % V_GROUPS, channel = at % DIM;
        if (place.first_row + row >= step.rows) break;
        const Softmax plain = of_all(row, 0), scaled = of_all(row, 1);
        float total = 0;
        for (int stage = 0; stage < V_STAGES; ++stage)
            total += parts[((stage * V_GROUPS + group) * ROWS + row) * DIM + channel];
        const float factor = scaled.sum != 0 ? scaled.sum / plain.sum * exp2_of(scaled.top - plain.top) / UNIT : 0;
        const i64 target = (i64(blockIdx.x) * place.pairs + place.pair) * step.rows + place.first_row + row;
        step.out[target * (V_GROUPS * DIM) + group * DIM + channel] = total * factor;
        if (at % (V_GROUPS * DIM) == 0) step.lse[target] = plain.sum == 0 ? NOTHING : (plain.top + log2_of(plain.sum)) * LN2;
    }
}
