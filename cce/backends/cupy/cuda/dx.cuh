// Epilogue of the gradient: dx from the logits of a tile (docs/algorithm.md, step 4).
#pragma once
#include "formula.cuh"

// Per row of the problem, in its own order; a, g, h and s have been multiplied by the scale.
struct Rows {
    const float *lse, *lse_low, *a, *g, *entropy, *h, *s;
    const int* targets;  // (N, K) places
    int K;
};

// Values of a row for the epilogue, read before the product, which hides the wait.
struct RowValues {
    float lse, low, a, h, centre, g, s;
    int target, row;
};

__device__ __forceinline__ RowValues row_values(const Rows& rows, int row) {
    RowValues values = {rows.lse[row], rows.lse_low[row], rows.a[row], 0, 0, 0, 0, -1, row};
    if constexpr (ENTROPY) {
        values.h = rows.h[row];
        values.centre = values.low - rows.entropy[row];
    }
    if constexpr (WEIGHTED) values.s = rows.s[row];
    if constexpr (!SEVERAL_TARGETS) {
        values.target = rows.targets[row];
        values.g = rows.g[row];
    }
    return values;
}

// dz -= g where the column is the target's; ``column`` counts from the first of the JB accumulators from j0.
template <int J, int JB>
__device__ __forceinline__ void subtract_at(float (&dz)[J][4], int j0, int x, int column, float g) {
    if (column < 0 || column >= 8 * JB) return;
#pragma unroll
    for (int j = 0; j < JB; ++j) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            if (8 * j + lane_column(y) == column) dz[j0 + j][2 * x + y] -= g;
        }
    }
}

// z becomes dx = softcap'(z) (p (a + h ((lse - z) + (lse_low - H))) - sum_k g_k [j = target_k] + s u_j), with
// p = exp((z - lse) - lse_low): NaN where lse is not finite, since lse_low is NaN then.
// Applies to the JB accumulators from j0, whose columns are consecutive from ``place`` in the vocabulary, and to row x.
// ``weight``: u of these columns, in shared memory.
template <int J, int JB>
__device__ __forceinline__ void dx_of_row(
    float (&z)[J][4], int j0, int x, int place, const RowValues& values, const Rows& rows, const float* weight,
    const Formula& formula) {
    float ratio[SOFTCAP ? JB : 1][2];
    const float inverse = SOFTCAP ? 1 / formula.softcap : 0.0f;
#pragma unroll
    for (int j = 0; j < JB; ++j) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            float& value = z[j0 + j][2 * x + y];
            const float below = __fsub_rn(value, values.lse), p = exp_of(below, values.low);
            if constexpr (SOFTCAP) ratio[j][y] = value * inverse;
            if constexpr (ENTROPY) {
                value = p * (values.a + values.h * (values.centre - fmaxf(below, -1e4f)));  // p is 0 where z is lower
            } else {
                value = p * values.a;
            }
            if constexpr (SOFTCAP && WEIGHTED) value += values.s * weight[8 * j + lane_column(y)];
        }
    }
    if constexpr (!SEVERAL_TARGETS) {
        if (values.target >= 0) subtract_at<J, JB>(z, j0, x, values.target - place, values.g);
    } else {
        for (int k = 0; k < rows.K; ++k) {
            const long long where = static_cast<long long>(values.row) * rows.K + k;
            const int target = rows.targets[where];
            if (target >= 0) subtract_at<J, JB>(z, j0, x, target - place, rows.g[where]);
        }
    }
    if constexpr (SOFTCAP) {
#pragma unroll
        for (int j = 0; j < JB; ++j) {
#pragma unroll
            // 0 for a masked entry, whose ratio is -inf.
            for (int y = 0; y < 2; ++y) z[j0 + j][2 * x + y] *= fmaxf(1 - ratio[j][y] * ratio[j][y], 0.0f);
        }
    }
}

// Both rows of the lane; one that does not count (``counts`` false) gets zeros, whatever its logits are.
template <int J, int JB>
__device__ __forceinline__ void dx_of_block(
    float (&z)[J][4], int j0, int place, const RowValues (&values)[2], const bool (&counts)[2], const Rows& rows,
    const float* weight, const Formula& formula) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        dx_of_row<J, JB>(z, j0, x, place, values[x], rows, weight, formula);
        if (!counts[x]) {
#pragma unroll
            for (int j = j0; j < j0 + JB; ++j) z[j][2 * x] = z[j][2 * x + 1] = 0;
        }
    }
}

// sums[8 J]: of each column over the warp's 16 rows, in shared memory; rows that do not count hold zeros.
template <int J>
__device__ __forceinline__ void warp_column_sums(const float (&dx)[J][4], float* sums) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            float total = dx[j][y] + dx[j][2 + y];
            total += __shfl_xor_sync(0xffffffff, total, 4);
            total += __shfl_xor_sync(0xffffffff, total, 8);
            total += __shfl_xor_sync(0xffffffff, total, 16);
            if (lane_of_warp() < 4) sums[8 * j + lane_column(y)] = total;
        }
    }
}

// Two numbers in the products' dtype, the first in the low half.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned both;
#if DTYPE == FLOAT16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}
