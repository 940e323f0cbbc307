// dx of a chunk's live tiles, into slots of [BLOCK_N, BLOCK_V] (docs/algorithm.md, step 4).
#include "dx.cuh"
#include "tiles.cuh"

// The rows of e are a copy in the work list's order.
#ifndef SORTED
#define SORTED 0
#endif

struct LiveArguments {
    Matrix e, c;  // (N, D), (V, D)
    const long long* order;  // (V,) entries, or null
    const float* bias;  // (V,) by entry
    Rows rows;
    const int* row_of;  // (N,) by place in the work list: the row, -1 for one that wants no gradient
    const int *tile_list, *item_block, *item_first, *item_slot, *item_tiles, *items;
    element* dz;  // (slots + 1, BLOCK_N, BLOCK_V)
    float* column_sums;  // (slots, BLOCK_V)
    Formula formula;
    int N, V, T, max_items, chunk;
};

static_assert(TILE_N == BLOCK_N && TILE_V % BLOCK_V == 0, "a tile is whole blocks of the filter");
constexpr int JB = least(J, BLOCK_V / 8);  // accumulators of a warp that belong to one vocabulary block

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE) live_kernel(const __grid_constant__ LiveArguments p) {
    const int total = p.items[p.chunk];
    const long long base = static_cast<long long>(p.chunk) * p.max_items;
    for (int item = blockIdx.x; item < total; item += gridDim.x) {
        // Tile origin: rows of block b in the work list's order; for each BLOCK_V columns one of its live tiles.
        const int b = p.item_block[base + item], slot = p.item_slot[base + item], count = p.item_tiles[base + item];
        const int* tiles = p.tile_list + static_cast<long long>(b) * p.T + p.item_first[base + item];
        const auto place_of = [&](int column) {
            return tiles[min(column / BLOCK_V, count - 1)] * BLOCK_V + column % BLOCK_V;
        };
        const auto entry_of = [&](int column) {
            const int place = min(place_of(column), p.V - 1);
            return p.order == nullptr ? place : static_cast<int>(p.order[place]);
        };
        const RowList<TILE_N> read([&](int r) {
            const int sorted_row = min(b * BLOCK_N + r, p.N - 1);
            return SORTED ? sorted_row : max(p.row_of[sorted_row], 0);
        });
        const RowList<TILE_V> entries(entry_of);
        __syncthreads();  // all are done with the tile before
        if constexpr (BIAS) {
            for (int column = threadIdx.x; column < TILE_V; column += THREADS) tile_bias()[column] = p.bias[entry_of(column)];
        }
        // Logit tile, as in the forward.
        float z[J][4];
        logit_tile(z, p.e, read, p.c, entries);
        cap(z, tile_bias() + warp_column(), p.formula);
        // Epilogue: dx, 0 of rows and columns that do not exist.
        RowValues values[2];
        bool counts[2];
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const int sorted_row = b * BLOCK_N + warp_row() + lane_row(x);
            const int row = p.row_of[min(sorted_row, p.N - 1)];
            counts[x] = sorted_row < p.N && row >= 0;
            values[x] = row_values(p.rows, max(row, 0));
        }
#pragma unroll
        for (int j0 = 0; j0 < J; j0 += JB) {
            const int column = warp_column() + 8 * j0, place = place_of(column), nth = column / BLOCK_V;
            dx_of_block<J, JB>(z, j0, place, values, counts, p.rows, nullptr, p.formula);
            if (place + 8 * JB > p.V) mask<J, JB>(z, p.V - place, 0.0f, j0);
            // Store.
            if (nth >= count) continue;
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const long long row = static_cast<long long>(slot + nth) * BLOCK_N + warp_row() + lane_row(x);
                element* to = p.dz + row * BLOCK_V + column % BLOCK_V + lane_column(0);
#pragma unroll
                for (int j = 0; j < JB; ++j) store_pair(to + 8 * j, z[j0 + j][2 * x], z[j0 + j][2 * x + 1], true);
            }
        }
        if constexpr (DBIAS) {
            column_sums(z, [&](int column, float sum) {
                if (column / BLOCK_V < count) p.column_sums[static_cast<long long>(slot) * BLOCK_V + column] = sum;
            });
        }
    }
}
