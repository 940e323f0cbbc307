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
        __syncwarp();  // no lane still reads the last tile's
#pragma unroll
        for (int i = 0; i < TILE_V / 32; ++i) shared[32 * i + threadIdx.x % 32] = values[i];
        __syncwarp();
    }
};

/// The warp's place for its nth array of columns, behind what the pipeline has; warps of the multipliers only. Asked
/// for where it is used: an address kept through the product would take a register.
__device__ __forceinline__ float* warp_columns(int nth) {
    extern __shared__ char memory[];
    const u32 offset = Pipeline().rest() - shared_address(memory);
    return reinterpret_cast<float*>(memory + offset) + (nth * 8 + threadIdx.x / 32 - 4) * TILE_V;
}
