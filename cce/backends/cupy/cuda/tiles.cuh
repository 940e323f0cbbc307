// The logit tile: e c^T of TILE_N rows and TILE_V columns, accumulated in float32 in the registers of eight warps.
#pragma once
#include "dx.cuh"
#include "multiply.cuh"

#ifndef TILE_N
#define TILE_N 128
#endif
#ifndef TILE_V
#define TILE_V 128
#endif

// Blocks of threads that share a multiprocessor: two, if 128 registers a thread suffice.
#ifndef BLOCKS_AT_ONCE
#define BLOCKS_AT_ONCE (TILE_V > 128 || SOFTCAP || ENTROPY || WEIGHTED || PREDICTION ? 1 : 2)
#endif

// Warps side by side: WARPS_N of 16 rows each, WARPS_V of COLUMNS columns.
constexpr int WARPS_N = TILE_N / 16, WARPS_V = WARPS / WARPS_N;
constexpr int COLUMNS = TILE_V / WARPS_V, J = COLUMNS / 8;
constexpr int E_BYTES = along_bytes(TILE_N), C_BYTES = along_bytes(TILE_V), STAGE_BYTES = E_BYTES + C_BYTES;
static_assert(TILE_N % 16 == 0 && WARPS % WARPS_N == 0 && COLUMNS % 16 == 0, "whole accumulators for eight warps");

// Memory of a tile besides its operands, after the stages: bias and weight of its columns, if any.
constexpr int BIAS_BYTES = BIAS ? TILE_V * 4 : 0, WEIGHT_BYTES = WEIGHTED ? TILE_V * 4 : 0;
extern __shared__ __align__(128) char shared[];
__device__ __forceinline__ float* tile_bias() { return reinterpret_cast<float*>(shared + STAGES * STAGE_BYTES); }
__device__ __forceinline__ float* tile_weight() {
    return reinterpret_cast<float*>(shared + STAGES * STAGE_BYTES + BIAS_BYTES);
}

__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / WARPS_V * 16; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % WARPS_V * COLUMNS; }

// The warp's part of z, of some rows of e and of c. Those that do not exist may be any that do.
template <class ERows, class CRows>
__device__ __forceinline__ void logit_tile(
    float (&z)[J][4], const Matrix& e, const ERows& rows, const Matrix& c, const CRows& entries) {
    const unsigned base = shared_address(shared);
    fill(z, 0.0f);
    pipeline(
        cdiv(e.bytes, ROW_BYTES),
        [&](int step, int stage) {
            rows.copy(base + stage * STAGE_BYTES, e, step * ROW_BYTES);
            entries.copy(base + stage * STAGE_BYTES + E_BYTES, c, step * ROW_BYTES);
        },
        [&](int stage) {
            const unsigned a = base + stage * STAGE_BYTES;
            multiply<true, true, MOST_KSTEP>(z, a, a + E_BYTES, warp_row(), warp_column());
        });
}

// store(column, total) of the tile's columns: sums of the warps, in shared memory, added in their order.
template <class Store>
__device__ __forceinline__ void column_sums(const float (&dx)[J][4], Store store) {
    float* warps = reinterpret_cast<float*>(shared);
    warp_column_sums(dx, warps + warp_row() / 16 * TILE_V + warp_column());
    __syncthreads();
    for (int column = threadIdx.x; column < TILE_V; column += THREADS) {
        float total = 0;
        for (int warp = 0; warp < WARPS_N; ++warp) total += warps[warp * TILE_V + column];
        store(column, total);
    }
}

// Two neighbouring numbers of a row of dx in the products' dtype, the second only if it is ``both``.
__device__ __forceinline__ void store_pair(element* to, float first, float second, bool both) {
#if DTYPE == FLOAT32
    if (both) {
        *reinterpret_cast<float2*>(to) = make_float2(first, second);
    } else {
        *to = first;
    }
#else
    const unsigned packed = pack(first, second);
    if (both) {
        *reinterpret_cast<unsigned*>(to) = packed;
    } else {
        *to = static_cast<half_word>(packed & 0xffff);
    }
#endif
}

// Row block and tile of a program: GROUP_N row blocks side by side, row block fastest, so that they share what they read.
struct Unit {
    int i, t;
};
__device__ __forceinline__ Unit unit_of(int program, int blocks, int tiles) {
    constexpr int GROUP_N = 16;
    const int group = program / (GROUP_N * tiles), first = group * GROUP_N;
    const int size = min(blocks - first, GROUP_N), inside = program - group * GROUP_N * tiles;
    return {first + inside % size, inside / size};
}
