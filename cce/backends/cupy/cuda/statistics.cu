// Forward: statistics of every tile's rows; the logits stay in registers.
//
// Steps 1 and 2 of docs/algorithm.md. A block of threads owns TILE_N rows and one of S stretches of the vocabulary and
// walks along it, carrying each row's maximum and sum. With MAPS the statistics of every BLOCK_V entries are stored too.
#include "statistics.cuh"
#include "dx.cuh"
#include "tiles.cuh"

struct StatisticsArguments {
    Matrix e, c;  // (N, D), (V, D): V rows of c, behind ``first`` places of earlier ones
    const float *bias, *weight;  // (V,)
    Splits splits;
    Tiles tiles;
    Formula formula;
    int N, V, first, S;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
statistics_kernel(const __grid_constant__ StatisticsArguments p) {
    // Tile origin: the rows of block i, and for each t of the split TILE_V places of the window from t TILE_V.
    const Unit unit = unit_of(blockIdx.x, cdiv(p.N, TILE_N), p.S);
    const int row0 = unit.i * TILE_N, split = unit.t;
    const long long tiles = cdiv(p.V, TILE_V);
    const int begin_t = split * tiles / p.S, end_t = (split + 1) * tiles / p.S;
    const RowRange<TILE_N> read{row0, p.N - 1};

    RowStatistics rows[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        const int row = min(row0 + warp_row() + lane_row(x), p.N - 1);
        rows[x] = begin(p.splits, static_cast<long long>(split) * p.N + row, p.first != 0);
    }
    for (int t = begin_t; t < end_t; ++t) {
        const int v0 = t * TILE_V;
        if constexpr (BIAS || WEIGHTED) {
            __syncthreads();  // all are done with those of the tile before
            for (int column = threadIdx.x; column < TILE_V; column += THREADS) {
                const int v = min(v0 + column, p.V - 1);
                if constexpr (BIAS) tile_bias()[column] = p.bias[v];
                if constexpr (WEIGHTED) tile_weight()[column] = v0 + column < p.V ? p.weight[v] : 0.0f;
            }
        }
        // Logit tile: z = softcap tanh(scale (e c^T + bias) / softcap).
        const RowRange<TILE_V> entries{v0, p.V - 1};
        float z[J][4];
        logit_tile(z, p.e, read, p.c, entries);
        cap(z, tile_bias(), p.formula);
        // Epilogue: m, s and what else was asked for. The ragged last tile masks its columns beyond V.
        add_tile(z, p.V - v0, rows, tile_weight(), p.first + v0, row0 + warp_row(), p.N, p.tiles);
    }

    // Store: one number a row and split.
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        const int row = row0 + warp_row() + lane_row(x);
        join(rows[x]);
        if (row < p.N && lane_of_warp() % 4 == 0) store(rows[x], p.splits, static_cast<long long>(split) * p.N + row);
    }
}
