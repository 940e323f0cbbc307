// A warp's product of two operands in shared memory (copies.cuh): mma.sync, for float32 tf32 or multiply-adds.
#pragma once
#include "copies.cuh"
#include "formula.cuh"

__device__ __forceinline__ void load_matrices(unsigned (&x)[4], unsigned address, bool transpose) {
    if (transpose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address));
    }
}

__device__ __forceinline__ unsigned load_word(unsigned address) {
    unsigned x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

// d += a b of a 16 x 8 tile, 32 bytes of K.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if DTYPE == BFLOAT16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#elif DTYPE == FLOAT16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// float32 words rounded to tf32, ties away from zero; 16-bit factors stay.
template <int COUNT>
__device__ __forceinline__ void to_tf32(unsigned (&x)[COUNT]) {
#if DTYPE == FLOAT32
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(x[i]) : "f"(__uint_as_float(x[i])));
#endif
}

// Address of an element across: row k of K, a column.
template <int KSTEP>
__device__ __forceinline__ unsigned across_at(unsigned base, int k, int column) {
    const int chunk = column / CHUNK;
    return base + chunk / 8 * (KSTEP * ROW_BYTES) + chunk_at(k, chunk % 8) + column % CHUNK * SIZE;
}

// The factor of 16 rows from m0, k-th 32 bytes of the step.
template <bool ALONG, int KSTEP>
__device__ __forceinline__ void load_a(unsigned (&a)[4], unsigned base, int m0, int k) {
    const int lane = lane_of_warp(), row = lane % 8, i = lane / 8;
    if constexpr (ALONG) {
        load_matrices(a, base + chunk_at(m0 + row + i % 2 * 8, 2 * k + i / 2), false);
    } else if constexpr (SIZE == 2) {
        load_matrices(a, across_at<KSTEP>(base, 16 * k + row + i / 2 * 8, m0 + i % 2 * 8), true);
    } else {
#pragma unroll
        for (int n = 0; n < 4; ++n)
            a[n] = load_word(across_at<KSTEP>(base, 8 * k + lane % 4 + n / 2 * 4, m0 + lane / 4 + n % 2 * 8));
    }
    to_tf32(a);
}

// The factors of 16 columns from n0: words 0, 1 of the first eight, 2, 3 of the others.
template <bool ALONG, int KSTEP>
__device__ __forceinline__ void load_b(unsigned (&b)[4], unsigned base, int n0, int k) {
    const int lane = lane_of_warp(), row = lane % 8, i = lane / 8;
    if constexpr (ALONG) {
        load_matrices(b, base + chunk_at(n0 + row + i / 2 * 8, 2 * k + i % 2), false);
    } else if constexpr (SIZE == 2) {
        load_matrices(b, across_at<KSTEP>(base, 16 * k + row + i % 2 * 8, n0 + i / 2 * 8), true);
    } else {
#pragma unroll
        for (int n = 0; n < 4; ++n)
            b[n] = load_word(across_at<KSTEP>(base, 8 * k + lane % 4 + n % 2 * 4, n0 + lane / 4 + n / 2 * 8));
    }
    to_tf32(b);
}

// Four float32 of K from k, of a row m along or a column across.
template <bool ALONG, int KSTEP>
__device__ __forceinline__ void load_four(float (&x)[4], unsigned base, int m, int k) {
    if constexpr (ALONG) {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                     : "r"(base + chunk_at(m, k / 4)));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(load_word(across_at<KSTEP>(base, k + i, m)));
    }
}

// acc += a b of one step: rows m0 to m0 + 16 of operand a, columns n0 to n0 + 8 J of operand b, KSTEP of K.
template <bool A_ALONG, bool B_ALONG, int KSTEP, int J>
__device__ __forceinline__ void multiply(float (&acc)[J][4], unsigned a_base, unsigned b_base, int m0, int n0) {
    static_assert(J % 2 == 0, "two accumulators share a load");
#if DTYPE == FLOAT32 && IEEE
#pragma unroll 1
    for (int k = 0; k < KSTEP; k += 4) {
        float a[2][4];
#pragma unroll
        for (int x = 0; x < 2; ++x) load_four<A_ALONG, KSTEP>(a[x], a_base, m0 + lane_row(x), k);
#pragma unroll
        for (int j = 0; j < J; ++j) {
#pragma unroll
            for (int y = 0; y < 2; ++y) {
                float b[4];
                load_four<B_ALONG, KSTEP>(b, b_base, n0 + 8 * j + lane_column(y), k);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    acc[j][y] = fmaf(a[0][i], b[i], acc[j][y]);
                    acc[j][2 + y] = fmaf(a[1][i], b[i], acc[j][2 + y]);
                }
            }
        }
    }
#else
    constexpr int STEPS = KSTEP * SIZE / 32;
#pragma unroll 1  // unrolled, it takes more registers than two blocks of threads have, and spills some
    for (int k = 0; k < STEPS; ++k) {
        unsigned a[4];
        load_a<A_ALONG, KSTEP>(a, a_base, m0, k);
#pragma unroll
        for (int j = 0; j < J; j += 2) {
            unsigned b[4];
            load_b<B_ALONG, KSTEP>(b, b_base, n0 + 8 * j, k);
            mma(acc[j], a, b[0], b[1]);
            mma(acc[j + 1], a, b[2], b[3]);
        }
    }
#endif
}

template <int J>
__device__ __forceinline__ void fill(float (&acc)[J][4], float value) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][i] = value;
    }
}
