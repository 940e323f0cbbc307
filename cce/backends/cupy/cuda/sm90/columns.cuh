// Numbers of a tile's columns (bias, weights) as the epilogue wants them: in shared memory, one copy for each warp.
#pragma once

#include "pipeline.cuh"

/// Eight columns of the tile in each lane: read before the product, which hides the wait, and put down behind it.
struct Columns {
    float values[TILE_V / 32];

    /// Columns ``column`` to ``column + TILE_V`` of x; 0 from ``columns`` on.
    __device__ __forceinline__ void read(const float* x, int column, int columns) {
#pragma unroll
        for (int i = 0; i < TILE_V / 32; ++i) {
            const int mine = column + 32 * i + static_cast<int>(threadIdx.x % 32);
            values[i] = mine < columns ? x[mine] : 0.0f;
        }
    }

    /// The warp's TILE_V numbers, for all its lanes.
    __device__ __forceinline__ void put(float* shared) const {
        __syncwarp();  // nobody reads the last tile's any more
#pragma unroll
        for (int i = 0; i < TILE_V / 32; ++i) shared[32 * i + threadIdx.x % 32] = values[i];
        __syncwarp();
    }
};

/// Numbers in shared memory behind the pipeline's; ``offset`` of them come before.
__device__ __forceinline__ float* more_shared(const Pipeline& pipe, int offset) {
    extern __shared__ char memory[];
    return reinterpret_cast<float*>(memory + (pipe.rest() - shared_address(memory))) + offset;
}

/// The warp's place for its nth array of columns; warps of the multipliers only.
__device__ __forceinline__ float* warp_columns(const Pipeline& pipe, int nth) {
    return more_shared(pipe, (nth * 8 + threadIdx.x / 32 - 4) * TILE_V);
}
