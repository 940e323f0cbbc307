// The logit from the product, as every kernel makes it: bias, scale and softcap.
//
// A warp holds z of 16 rows and 8 J columns in the layout of mma.m16n8 and of wgmma.m64: lane l has, of rows l / 4 (x = 0)
// and l / 4 + 8 (x = 1), columns 8 j + 2 (l % 4) + y as z[j][2 x + y].
#pragma once
#include "options.cuh"

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_of(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A maximum to subtract: that of masked entries is -inf, and -inf + inf would be NaN.
__device__ __forceinline__ float finite(float m) { return m == NEG_INF ? 0.0f : m; }

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % 32; }

// Row x (0, 1) of the 16 that the lane holds, and column y (0, 1) of the 8 of an accumulator.
__device__ __forceinline__ int lane_row(int x) { return lane_of_warp() / 4 + 8 * x; }
__device__ __forceinline__ int lane_column(int y) { return 2 * (lane_of_warp() % 4) + y; }

struct Formula {
    float scale, softcap;
};

// z = softcap tanh(scale (z + bias) / softcap), for a product z = e c^T; bias of the warp's 8 J columns, all readable:
// in shared memory, with anything behind the last column.
template <int J>
__device__ __forceinline__ void cap(float (&z)[J][4], const float* bias, const Formula& formula) {
    if constexpr (!BIAS && !SCALE && !SOFTCAP) return;
    const float twice = formula.softcap * 2;
    const float factor = SOFTCAP ? formula.scale * 2 / formula.softcap * LOG2E : formula.scale;
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            const float b = BIAS ? bias[8 * j + lane_column(y)] : 0.0f;
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                float& value = z[j][2 * x + y];
                if constexpr (BIAS) value += b;
                if constexpr (SOFTCAP) {
                    // tanh y = 1 - 2 / (1 + exp 2y): no overflow, an absolute error of a unit in the last place of softcap.
                    value = formula.softcap - twice * reciprocal(1 + exp2_of(value * factor));
                } else if constexpr (SCALE) {
                    value *= factor;
                }
            }
        }
    }
}

// Of the JB accumulators from j0, columns from ``columns`` on become ``value``. Only a ragged last tile needs it, after the
// softcap, which would undo it.
template <int J, int JB = J>
__device__ __forceinline__ void mask(float (&z)[J][4], int columns, float value, int j0 = 0) {
#pragma unroll
    for (int j = 0; j < JB; ++j) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            if (8 * j + lane_column(y) >= columns) z[j0 + j][y] = z[j0 + j][2 + y] = value;
        }
    }
}

// Of the four lanes that share a row: the same bits in each.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

__device__ __forceinline__ int quad_min(int x) {
    x = min(x, __shfl_xor_sync(0xffffffff, x, 1));
    return min(x, __shfl_xor_sync(0xffffffff, x, 2));
}
