// The gradient of the logits of a window of the vocabulary, all rows, into scratch memory (docs/algorithm.md, step 4).
//
// Clusters take tiles of CLUSTER x 128 rows and 256 columns in turn, GROUP of them side by side along the rows.
#include "columns.cuh"
#include "rows16.cuh"
#include "turns.cuh"

struct Arguments {
    TensorMap e_map, c_map;  // boxes of 64 columns and 128, TILE_V / CLUSTER rows
    const float *bias, *weight;  // (V,)
    Rows rows;
    element* dz;         // (N, V), pitch
    float* column_sums;  // (blocks of 64 rows, V)
    i64 pitch;
    Formula formula;
    int N, V, D, first;
};

/// Writes the sums over the warp's 16 rows of 8 JB columns, from accumulator j0 on, to shared memory.
template <int JB>
__device__ __forceinline__ void sum_columns(const float (&dx)[32][4], int j0, float* sums) {
#pragma unroll
    for (int j = j0; j < j0 + JB; ++j) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            float total = dx[j][y] + dx[j][2 + y];
            total += __shfl_xor_sync(~0u, total, 4);
            total += __shfl_xor_sync(~0u, total, 8);
            total += __shfl_xor_sync(~0u, total, 16);
            if (lane_of_warp() < 4) sums[8 * j + lane_column(y)] = total;
        }
    }
}

/// Those over the warpgroup's 64 rows, in the order of the warps; ``first`` has the first warp's.
__device__ __forceinline__ void store_sums(const float* first, int half, float* to, int room) {
    warpgroup_sync(half);
#pragma unroll
    for (int i = 0; i < TILE_V / WARPGROUP; ++i) {
        const int column = i * WARPGROUP + threadIdx.x % WARPGROUP;
        const float* all = first + column;
        if (column < room) to[column] = (all[0] + all[TILE_V]) + (all[2 * TILE_V] + all[3 * TILE_V]);
    }
}

/// The multiplying warps.
__device__ __forceinline__ void compute(const Arguments& x) {
    constexpr int PART = ENTROPY && !DBIAS ? 4 : 8;  // accumulators at a time: what fits into registers
    const Pipeline pipe;
    const int half = threadIdx.x / WARPGROUP - 1;
    const int blocks = (x.N + CLUSTER * TILE_N - 1) / (CLUSTER * TILE_N);
    const int tiles = (x.V + TILE_V - 1) / TILE_V;
    const int warp_row = cluster_rank() * TILE_N + static_cast<int>(threadIdx.x - WARPGROUP) / 32 * 16;
    const int steps = (x.D + DEPTH - 1) / DEPTH;
    Ring ring;
    float z[32][4];
    for (int turn = blockIdx.x / CLUSTER; turn < blocks * tiles; turn += gridDim.x / CLUSTER) {
        // Tile origin, and what belongs to its rows and columns: read now, the product hides the wait.
        const Turn at(turn, blocks, tiles);
        const int row0 = at.row_block * CLUSTER * TILE_N + warp_row;
        const int column0 = at.tile * TILE_V;
        const bool inside[2] = {row0 + lane_row(0) < x.N, row0 + lane_row(1) < x.N};
        const RowValues values[2] = {row_values(x.rows, min(row0 + lane_row(0), x.N - 1)),
                                     row_values(x.rows, min(row0 + lane_row(1), x.N - 1))};
        Columns biases, weights;
        if constexpr (BIAS) biases.read(x.bias, column0, x.V);
        if constexpr (WEIGHTED) weights.read(x.weight, column0, x.V);
        // Logit tile, as in the forward.
        multiply<false, false>(z, pipe, ring, half, steps);
        float* const bias = warp_columns(0);
        float* const weight = warp_columns(BIAS);
        if constexpr (BIAS) biases.put(bias);
        if constexpr (WEIGHTED) weights.put(weight);
        cap(z, bias, x.formula);
        // Epilogue, and store. Columns beyond the window are stored nowhere, so they need no mask.
        const int room = x.V - column0;
        element* const dz = x.dz + (row0 + lane_row(0)) * x.pitch + column0;
        element* const to[2] = {dz, dz + 8 * x.pitch};
#pragma unroll
        for (int j = 0; j < 32; j += PART) {
            dx_of_block<32, PART>(
                z, j, x.first + column0 + 8 * j, values, inside, x.rows, weight + 8 * j, x.formula);
            if constexpr (DBIAS) {
                if (j == 0) warpgroup_sync(half);  // no warp still reads the last tile's sums
                sum_columns<PART>(z, j, warp_columns(BIAS + WEIGHTED));
            }
            if (room >= TILE_V)
                store_rows<PART, true>(z, j, to, room, inside);
            else
                store_rows<PART, false>(z, j, to, room, inside);
        }
        if constexpr (DBIAS) {
            const int block = row0 / 64;
            const float* first = warp_columns(BIAS + WEIGHTED) - threadIdx.x % WARPGROUP / 32 * TILE_V;
            float* const to_sums = x.column_sums + static_cast<i64>(block) * x.V + column0;
            if (block * 64 < x.N) store_sums(first, half, to_sums, room);
        }
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
gradient_kernel(const __grid_constant__ Arguments x) {
    Pipeline().start();
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32 && elected()) load_turns(x);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        compute(x);
    }
    cluster_sync();  // no block exits while another may still write to its memory
}
