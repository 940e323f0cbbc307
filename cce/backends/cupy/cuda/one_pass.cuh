// Logits kept for the gradient: q = exp(z - m) about the maximum m of each row and tile (docs/decisions/0003).
//
// q lies in [0, 1], where float16 is finer than bfloat16: of 16-bit factors it is float16 whatever their dtype.
#pragma once
#include "formula.cuh"

// Two numbers in float16, the first in the low half.
__device__ __forceinline__ unsigned pack_half(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// (T, N) each.
struct TileSums {
    float *max, *sum;
};

// z becomes q, of the lane's two rows; their m and sum q are stored. ``where``: tile * N + row of x = 0; ``inside``: that
// the row is there. A NaN among the logits makes both one; an infinite one the sum, and its own q.
template <int J>
__device__ __forceinline__ void keep_tile(
    float (&z)[J][4], const TileSums& tiles, long long where, const bool (&inside)[2]) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        float m = NEG_INF;
#pragma unroll
        for (int j = 0; j < J; ++j) m = fmaxf(m, fmaxf(z[j][2 * x], z[j][2 * x + 1]));
        m = quad_max(m);
        const float base = m == NEG_INF ? 0.0f : m;
        float s[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < J; ++j) {
#pragma unroll
            for (int y = 0; y < 2; ++y) {
                float& value = z[j][2 * x + y];
                value = exp_of(value, base);
                s[y] += value;
            }
        }
        const float total = quad_sum(s[0] + s[1]);
        if (inside[x] && lane_of_warp() % 4 == 0) {
            tiles.max[where + 8 * x] = m == INF ? m : maximum_of(m, total);
            tiles.sum[where + 8 * x] = total;
        }
    }
}
