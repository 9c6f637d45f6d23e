// Single instructions, and what a warp does together. tests/ops/cuda_on_cpu.h says the same in C++, for machines without a GPU.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define NOTHING __int_as_float(0xff800000)  // minus infinity

extern __shared__ uint4 shared[];

// Two float16 each.
DEVICE u32 add2(u32 a, u32 b) {
    u32 d;
    asm("add.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 mul2(u32 a, u32 b) {
    u32 d;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 minus2(u32 a) {
    u32 d;
    asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 pack2(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

DEVICE float half_of(u16 a) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a));
    return d;
}
DEVICE float exp2_of(float a) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}
DEVICE float log2_of(float a) {
    float d;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}
DEVICE void small_sincos(float angle, float* sine, float* cosine) {  // angles of a turn or so
    asm("sin.approx.f32 %0, %1;" : "=f"(*sine) : "f"(angle));
    asm("cos.approx.f32 %0, %1;" : "=f"(*cosine) : "f"(angle));
}

// Shared memory by address; what is read so is not written meanwhile.
DEVICE u32 address_of(const void* in_shared) { return u32(__cvta_generic_to_shared(in_shared)); }
template <int OFFSET>
DEVICE void read_four(u32 address, u32* four) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3])
                 : "r"(address), "n"(OFFSET));
}
template <int OFFSET>
DEVICE void add_to(u32 address, int value) {
    asm volatile("red.shared.add.s32 [%0 + %1], %2;" ::"r"(address), "n"(OFFSET), "r"(value) : "memory");
}

DEVICE void set_to_anything(uint4& a) { asm("" : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w)); }

// A warp's product of 16 keys by 16 channels and 16 channels by 8 rows, added to `sums`. Thread 4 n + p has channels 2 p, 2 p + 1 and
// 2 p + 8, 2 p + 9 of keys n (`first`) and n + 8 (`second`) and of row n; and the sums of key n and rows 2 p, 2 p + 1, then of
// key n + 8.
DEVICE void multiply(float* sums, const u32* first, const u32* second, u32 row0, u32 row1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(first[0]), "r"(second[0]), "r"(first[1]), "r"(second[1]), "r"(row0), "r"(row1));
}
