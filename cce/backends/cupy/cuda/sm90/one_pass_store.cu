// Logits that are all held at once, stored as q = exp(z - m); m and sum q of each row and tile (../one_pass.cuh).
#include "columns.cuh"
#include "rows16.cuh"
#include "turns.cuh"

struct Arguments {
    TensorMap e_map, c_map;  // boxes of 64 columns and 128, TILE_V / CLUSTER rows
    const float* bias;       // (V,)
    half_word* q;            // (N, V), pitch; the columns of the last tile filled up to eight
    i64 pitch;
    TileSums tiles;
    Formula formula;
    int N, V, D;
};

/// The multiplying warps.
__device__ __forceinline__ void compute(const Arguments& x) {
    const Pipeline pipe;
    const int half = threadIdx.x / WARPGROUP - 1;
    const int blocks = (x.N + CLUSTER * TILE_N - 1) / (CLUSTER * TILE_N);
    const int tiles = (x.V + TILE_V - 1) / TILE_V;
    const int warp_row = cluster_rank() * TILE_N + static_cast<int>(threadIdx.x - WARPGROUP) / 32 * 16;
    const int steps = (x.D + DEPTH - 1) / DEPTH;
    Ring ring;
    float z[32][4];
    for (int turn = blockIdx.x / CLUSTER; turn < blocks * tiles; turn += gridDim.x / CLUSTER) {
        const Turn at(turn, blocks, tiles);
        const int row = at.row_block * CLUSTER * TILE_N + warp_row + lane_row(0);
        const int column0 = at.tile * TILE_V, room = x.V - column0;
        const bool inside[2] = {row < x.N, row + 8 < x.N};
        Columns biases;
        if constexpr (BIAS) biases.read(x.bias, column0, x.V);
        // Logit tile, as in the forward.
        multiply<false, false>(z, pipe, ring, half, steps);
        float* const bias = warp_columns(0);
        if constexpr (BIAS) biases.put(bias);
        cap(z, bias, x.formula);
        if (room < TILE_V) mask(z, room, NEG_INF);
        // Epilogue: statistics of the tile, z becomes q. Store.
        keep_tile(z, x.tiles, static_cast<i64>(at.tile) * x.N + row, inside);
        half_word* const q = x.q + row * x.pitch + column0;
        half_word* const to[2] = {q, q + 8 * x.pitch};
        if (room >= TILE_V)
            store_rows<32, true, true>(z, 0, to, room, inside);
        else
            store_rows<32, false, true>(z, 0, to, (room + 7) / 8 * 8, inside);
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
store_kernel(const __grid_constant__ Arguments x) {
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
