// Forward: statistics of every tile's rows, then of the rows; the logits stay in registers.
//
// A cluster owns CLUSTER x 128 rows and one of `splits` stretches of the vocabulary and walks along it, carrying each
// row's maximum and sum; then it takes the next such unit. GROUP: clusters of rows side by side. Steps 1 and 2 of
// docs/algorithm.md. Meanwhile idle warps gather rows of c for the next window, where the vocabulary has an order.
#include "../statistics.cuh"
#include "ahead.cuh"
#include "columns.cuh"

struct Arguments {
    TensorMap e_map, c_map;  // boxes of 64 columns and 128, TILE_V / CLUSTER rows
    const float *bias, *weight;  // (V,)
    Splits splits;
    Tiles tiles;
    Formula formula;
    int N, V, D, S, first, carry;
    Ahead ahead;  // no rows: nothing is
};

/// Rows and tiles of a unit: GROUP row blocks run side by side, so that they share what they read of c.
struct Unit {
    int row_block, split, begin, end;

    __device__ __forceinline__ Unit(int unit, int blocks, const Arguments& x) {
        const int group = unit / (GROUP * x.S);
        const int inside = unit - group * GROUP * x.S;
        const int size = min(blocks - group * GROUP, GROUP);
        const i64 count = (x.V + TILE_V - 1) / TILE_V;
        row_block = group * GROUP + inside % size;
        split = inside / size;
        begin = static_cast<int>(split * count / x.S);
        end = static_cast<int>((split + 1) * count / x.S);
    }
};

/// The loading thread: boxes of e and c, in the order in which they are multiplied.
__device__ __forceinline__ void load(const Arguments& x) {
    const int rank = cluster_rank();
    const int blocks = (x.N + CLUSTER * TILE_N - 1) / (CLUSTER * TILE_N);
    const int steps = (x.D + DEPTH - 1) / DEPTH;
    const Pipeline pipe;
    Ring ring;
    for (int unit = blockIdx.x / CLUSTER; unit < blocks * x.S; unit += gridDim.x / CLUSTER) {
        const Unit u(unit, blocks, x);
        const int row0 = (u.row_block * CLUSTER + rank) * TILE_N;
        for (int t = u.begin; t < u.end; ++t) {
            for (int step = 0; step < steps; ++step) {
                const u32 full = pipe.claim(ring);
                load_box(pipe.a(ring.stage), x.e_map, step * DEPTH, row0, full);
                load_part(pipe.b(ring.stage), x.c_map, step * DEPTH, t * TILE_V, full, rank);
                ring.next();
            }
        }
    }
}

/// The multiplying warps.
__device__ __forceinline__ void compute(const Arguments& x) {
    const Pipeline pipe;
    const int half = threadIdx.x / WARPGROUP - 1;
    const int blocks = (x.N + CLUSTER * TILE_N - 1) / (CLUSTER * TILE_N);
    const int warp_row = cluster_rank() * TILE_N + static_cast<int>(threadIdx.x - WARPGROUP) / 32 * 16;
    const int steps = (x.D + DEPTH - 1) / DEPTH;
    Ring ring;
    float z[32][4];
    for (int unit = blockIdx.x / CLUSTER; unit < blocks * x.S; unit += gridDim.x / CLUSTER) {
        const Unit u(unit, blocks, x);
        const int row0 = u.row_block * CLUSTER * TILE_N + warp_row;
        const i64 kept = static_cast<i64>(u.split) * x.N;
        RowStatistics rows[2];
        for (int i = 0; i < 2; ++i) rows[i] = begin(x.splits, kept + min(row0 + lane_row(i), x.N - 1), x.carry);
        for (int t = u.begin; t < u.end; ++t) {
            Columns biases, weights;
            if constexpr (BIAS) biases.read(x.bias, t * TILE_V, x.V);
            if constexpr (WEIGHTED) weights.read(x.weight, t * TILE_V, x.V);
            // Logit tile: z = softcap tanh(scale (e c^T + bias) / softcap).
            multiply<false, false>(z, pipe, ring, half, steps);
            float* const bias = warp_columns(0);
            float* const weight = warp_columns(BIAS);
            if constexpr (BIAS) biases.put(bias);
            if constexpr (WEIGHTED) weights.put(weight);
            cap(z, bias, x.formula);
            // Epilogue.
            add_tile(z, x.V - t * TILE_V, rows, weight, x.first + t * TILE_V, row0, x.N, x.tiles);
        }
        // Store: one number a row and split.
        for (int i = 0; i < 2; ++i) {
            join(rows[i]);
            const int row = row0 + lane_row(i);
            if (row < x.N && lane_of_warp() % 4 == 0) store(rows[i], x.splits, kept + row);
        }
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
statistics_kernel(const __grid_constant__ Arguments x) {
    Pipeline().start();
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x >= 32) gather_ahead(x.ahead);
        else if (elected()) load(x);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        compute(x);
    }
    cluster_sync();  // no block exits while another may still write to its memory
}
