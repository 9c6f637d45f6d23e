// What step_ptx.cuh says, and CUDA's own words, in C++: thread blocks one after another, their threads as coroutines that hand over
// where they would wait for each other. Shared memory begins as NaN, and an address outside ends the program.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#define DEVICE inline
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define NOTHING (-INFINITY)

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Index { int x, y, z; };

constexpr int SHARED = 1 << 18;
alignas(16) inline uint4 shared[SHARED / 16];
inline int shared_bytes;
inline Index blockIdx, blockDim, gridDim;

// Threads and their waiting for each other.
struct Barrier {
    int arrived = 0;
    long round = 0;
};
struct Warp {
    Barrier barrier;
    float value[32];
    u32 first[32][2], second[32][2], row[32][2];
};
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    Index index;
    bool ended = false;
};
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier everybody;
inline size_t now;
inline ucontext_t outside;
#define threadIdx (threads[now].index)

inline void hand_over() {
    const size_t from = now;
    do now = (now + 1) % threads.size();
    while (threads[now].ended && now != from);
    if (now != from) swapcontext(&threads[from].context, &threads[now].context);
}
inline void wait(Barrier& barrier, int count) {
    const long round = barrier.round;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.round;
    }
    while (barrier.round == round) hand_over();
}
inline Warp& my_warp() { return warps[now / 32]; }
inline void __syncthreads() { wait(everybody, int(threads.size())); }
inline bool __syncthreads_and(bool mine) {
    static bool all;
    all = true;
    __syncthreads();
    all = all && mine;
    __syncthreads();
    const bool answer = all;
    __syncthreads();
    return answer;
}
inline float __shfl_xor_sync(u32, float value, int lanes) {
    Warp& warp = my_warp();
    const int lane = int(now % 32);
    warp.value[lane] = value;
    wait(warp.barrier, 32);
    const float other = warp.value[lane ^ lanes];
    wait(warp.barrier, 32);
    return other;
}

// Numbers.
inline float half_of(u16 a) {
    _Float16 half;
    memcpy(&half, &a, 2);
    return float(half);
}
inline u16 half_bits(float a) {
    const _Float16 half = _Float16(a);
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}
inline u32 pack2(float low, float high) { return half_bits(low) | u32(half_bits(high)) << 16; }
template <class F>
inline u32 both_halves(F of, u32 a, u32 b, u32 c) {
    return pack2(of(half_of(u16(a)), half_of(u16(b)), half_of(u16(c))), of(half_of(a >> 16), half_of(b >> 16), half_of(c >> 16)));
}
inline u32 add2(u32 a, u32 b) { return both_halves([](float x, float y, float) { return x + y; }, a, b, 0); }
inline u32 mul2(u32 a, u32 b) { return both_halves([](float x, float y, float) { return x * y; }, a, b, 0); }
inline u32 fma2(u32 a, u32 b, u32 c) { return both_halves([](float x, float y, float z) { return x * y + z; }, a, b, c); }
inline u32 minus2(u32 a) { return a ^ 0x80008000u; }
inline float exp2_of(float a) { return exp2f(a); }
inline float log2_of(float a) { return log2f(a); }
inline void small_sincos(float angle, float* sine, float* cosine) { *sine = sinf(angle), *cosine = cosf(angle); }
inline int __float2int_rn(float a) { return a != a ? 0 : int(lrintf(a)); }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const unsigned long long bytes = a | (unsigned long long)b << 32;
    u32 out = 0;
    for (int at = 0; at < 4; ++at) out |= u32(bytes >> 8 * (selector >> 4 * at & 7) & 255) << 8 * at;
    return out;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }

// Memory.
template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
inline u32 address_of(const void* in_shared) { return u32(static_cast<const char*>(in_shared) - reinterpret_cast<char*>(shared)); }
inline char* at_address(u32 address, int bytes) {
    if (address + bytes > u32(shared_bytes)) {
        fprintf(stderr, "address %u is outside the %d bytes of shared memory\n", address, shared_bytes);
        abort();
    }
    return reinterpret_cast<char*>(shared) + address;
}
template <int OFFSET>
inline void read_four(u32 address, u32* four) { memcpy(four, at_address(address + OFFSET, 16), 16); }
template <int OFFSET>
inline void add_to(u32 address, int value) { *reinterpret_cast<int*>(at_address(address + OFFSET, 4)) += value; }
inline void set_to_anything(uint4& a) { memset(&a, 255, 16); }

inline void multiply(float* sums, const u32* first, const u32* second, u32 row0, u32 row1) {
    Warp& warp = my_warp();
    const int lane = int(now % 32), key = lane / 4, pair = lane % 4;
    memcpy(warp.first[lane], first, 8), memcpy(warp.second[lane], second, 8);
    warp.row[lane][0] = row0, warp.row[lane][1] = row1;
    wait(warp.barrier, 32);
    for (int which = 0; which < 4; ++which) {
        const int row = 2 * pair + which % 2;
        for (int part = 0; part < 4; ++part)
            for (int j = 0; j < 2; ++j) {
                const u32 of_key = which < 2 ? warp.first[4 * key + part][j] : warp.second[4 * key + part][j];
                const u32 of_row = warp.row[4 * row + part][j];
                sums[which] += half_of(u16(of_key)) * half_of(u16(of_row)) + half_of(of_key >> 16) * half_of(of_row >> 16);
            }
    }
    wait(warp.barrier, 32);
}

// Runs a kernel.
template <class Argument>
void launch(void (*kernel)(Argument), const Argument& argument, Index grid, int count, int bytes) {
    static void (*run)(Argument);
    static const Argument* with;
    run = kernel, with = &argument, gridDim = grid, blockDim = {count, 1, 1}, shared_bytes = bytes;
    if (bytes > SHARED) abort();
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                memset(shared, 255, SHARED);
                threads.resize(count), warps.assign((count + 31) / 32, Warp());
                everybody = Barrier();
                for (int number = 0; number < count; ++number) {
                    Thread& thread = threads[number];
                    thread.index = {number, 0, 0}, thread.ended = false;
                    thread.stack.resize(1 << 16);
                    getcontext(&thread.context);
                    thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
                    thread.context.uc_link = nullptr;
                    makecontext(&thread.context, +[] {
                        run(*with);
                        threads[now].ended = true;
                        hand_over();
                        setcontext(&outside);  // nobody is left
                    }, 0);
                }
                now = 0;
                swapcontext(&outside, &threads[0].context);
            }
}
