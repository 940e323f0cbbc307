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

// exp(x - y), in which a multiply-add must not take the place of the difference.
__device__ __forceinline__ float exp_of(float x, float y) { return exp2_of(__fmul_rn(__fsub_rn(x, y), LOG2E)); }

// Factor that turns a sum relative to the maximum m into one relative to ``base`` >= m: at most 1, so that a sum of 0
// stays one where the row's maximum is inf, and its base 0.
__device__ __forceinline__ float rebased(float m, float base) {
    return exp2_of(__fmul_rn(fminf(__fsub_rn(m, base), 0.0f), LOG2E));
}

__device__ __forceinline__ bool is_infinite(float x) { return fabsf(x) == INF; }

// A maximum to subtract, but 0 for an infinite one: that of masked entries is -inf, and -inf + inf would be NaN; about
// inf itself a sum could not tell an infinite logit from NaN.
__device__ __forceinline__ float finite(float m) { return is_infinite(m) ? 0.0f : m; }

// The maximum of logits whose sum is s: NaN, which fmaxf leaves out, where one of them is.
__device__ __forceinline__ float maximum_of(float m, float s) { return s == s ? m : s; }

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % 32; }

// Row x (0, 1) of the 16 that the lane holds, and column y (0, 1) of the 8 of an accumulator.
__device__ __forceinline__ int lane_row(int x) { return lane_of_warp() / 4 + 8 * x; }
__device__ __forceinline__ int lane_column(int y) { return 2 * (lane_of_warp() % 4) + y; }

struct Formula {
    float scale, softcap;
};

// softcap tanh(x / softcap), to a few units in the last place of the result however small it is.
__device__ __forceinline__ float capped(float x, float softcap) {
    const float inverse = 1 / softcap, y = x * inverse, square = y * y;
    // x (1 - y^2 / 3 + 2 y^4 / 15 - ...), with coefficients that spread the error over |y| < SERIES: below 2^-24.
    constexpr float SERIES = 0.55f;
    float series = fmaf(square, 1.6437581e-2f, -5.2671814e-2f);
    series = fmaf(series, square, 1.3320725e-1f);
    series = fmaf(series, square, -3.3332947e-1f);
    const float small = fmaf(__fmul_rn(x, square), series, x);
    // tanh y = 1 - 2 / (1 + exp 2y): no overflow, but an absolute error of a unit in the last place of softcap.
    const float large = fmaf(-2 * softcap, reciprocal(1 + exp2_of(y * (2 * LOG2E))), softcap);
    return fabsf(y) < SERIES ? small : large;
}

// A logit from its product x = e c^T: scale (x + bias), or softcap tanh(scale (x + bias) / softcap), which keeps -inf of a
// bias. Rounded: the compiler must not make a multiply-add of it and of the subtraction of a maximum.
__device__ __forceinline__ float logit_of(float x, float bias, const Formula& formula) {
    if constexpr (BIAS) x = __fadd_rn(x, bias);
    if constexpr (SCALE || SOFTCAP) x = __fmul_rn(x, formula.scale);
    if constexpr (SOFTCAP) {
        x = capped(x, formula.softcap);
        if (BIAS && bias == NEG_INF) x = NEG_INF;
    }
    return x;
}

// Products of the warp become logits; bias of its 8 J columns, all readable: in shared memory, with anything behind the
// last column.
template <int J>
__device__ __forceinline__ void cap(float (&z)[J][4], const float* bias, const Formula& formula) {
    if constexpr (!BIAS && !SCALE && !SOFTCAP) return;
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            const float b = BIAS ? bias[8 * j + lane_column(y)] : 0.0f;
#pragma unroll
            for (int x = 0; x < 2; ++x) z[j][2 * x + y] = logit_of(z[j][2 * x + y], b, formula);
        }
    }
}

// Set columns from ``columns`` on to ``value``, in the JB accumulators from j0. Only a ragged last tile needs it, after
// the softcap, which would undo it.
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

// Reductions over the four lanes that share a row: the same bits in each.
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
