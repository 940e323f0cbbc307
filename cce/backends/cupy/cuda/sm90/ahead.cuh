// Rows of c for the next window, gathered by warps that have nothing else to do: the memory has time while all multiply.
#pragma once

#include "pipeline.cuh"

struct Ahead {
    const uint4* from;  // (any, pieces) of 16 bytes
    const i64* order;   // (rows,)
    uint4* to;          // (rows, pieces)
    i64 pitch;          // pieces
    int rows, pieces;
};

/// By warps 1 to 3 of the loading warpgroup, of every block: a warp has every so many-th row.
__device__ __forceinline__ void gather_ahead(const Ahead& x) {
    constexpr int WARPS = WARPGROUP / 32 - 1;
    const int lane = threadIdx.x % 32;
    for (int row = blockIdx.x * WARPS + threadIdx.x / 32 - 1; row < x.rows; row += gridDim.x * WARPS) {
        const uint4* const from = x.from + __ldg(x.order + row) * x.pitch;
        uint4* const to = x.to + static_cast<i64>(row) * x.pieces;
#pragma unroll 4
        for (int n = lane; n < x.pieces; n += 32) to[n] = __ldg(from + n);
    }
}
