// dx of all rows and a window of the vocabulary, into scratch memory (docs/algorithm.md, step 4).
#include "dx.cuh"
#include "tiles.cuh"

struct GradientArguments {
    Matrix e, c;  // (N, D), (V, D): V rows of c from place ``first`` on
    const float *bias, *weight;  // (V,)
    Rows rows;
    element* dz;  // (N, V)
    long long pitch_dz;  // elements
    float* column_sums;  // (blocks of rows, V)
    Formula formula;
    int N, V, first;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
gradient_kernel(const __grid_constant__ GradientArguments p) {
    // Tile origin: rows of block i, places of the window's tile t.
    const Unit unit = unit_of(blockIdx.x, cdiv(p.N, TILE_N), cdiv(p.V, TILE_V));
    const int row0 = unit.i * TILE_N, v0 = unit.t * TILE_V;
    if constexpr (BIAS || WEIGHTED) {
        for (int column = threadIdx.x; column < TILE_V; column += THREADS) {
            const int v = min(v0 + column, p.V - 1);
            if constexpr (BIAS) tile_bias()[column] = p.bias[v];
            if constexpr (WEIGHTED) tile_weight()[column] = p.weight[v];
        }
    }
    // Logit tile, as in the forward.
    const RowRange<TILE_N> read{row0, p.N - 1};
    const RowRange<TILE_V> entries{v0, p.V - 1};
    float z[J][4];
    logit_tile(z, p.e, read, p.c, entries);
    RowValues values[2];
    bool counts[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        const int row = row0 + warp_row() + lane_row(x);
        counts[x] = row < p.N;
        values[x] = row_values(p.rows, min(row, p.N - 1));
    }
    const int column0 = warp_column();
    cap(z, tile_bias() + column0, p.formula);
    // Epilogue. Columns beyond the window are stored nowhere, so they need no mask.
    dx_of_block<J, J>(z, 0, p.first + v0 + column0, values, counts, p.rows, tile_weight() + column0, p.formula);
    // Store.
    if constexpr (DBIAS) {
        float* sums = p.column_sums + static_cast<long long>(unit.i) * p.V + v0;
        column_sums(z, [&](int column, float total) {
            if (v0 + column < p.V) sums[column] = total;
        });
    }
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        if (!counts[x]) continue;
        element* row = p.dz + values[x].row * p.pitch_dz;
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const int column = v0 + column0 + 8 * j + lane_column(0);
            if (column < p.V) store_pair(row + column, z[j][2 * x], z[j][2 * x + 1], column + 1 < p.V);
        }
    }
}
