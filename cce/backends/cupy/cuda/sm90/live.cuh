// A filtered backward's arguments, and what its three products have in common (docs/algorithm.md, step 4).
#pragma once

#include "columns.cuh"
#include "grid.cuh"
#include "rows16.cuh"

/// Tables of the plan; cce/backends/gpu/plan.py says what they hold. T vocabulary blocks, B row blocks.
struct Plan {
    const int *tile_list, *live_count, *block_list, *slot_list, *chunk_start;
    const int *block_slot, *block_tiles, *block_first;
    const int *item_block, *item_first, *item_slot, *item_tiles, *items;
    int max_items, T, B;
};

struct Arguments {
    TensorMap e_map, c_map, dz_map;  // boxes of 64 x 64; e in the work list's order
    Plan plan;
    Rows rows;
    const i64* order;
    const int* row_of;    // (N,) of a place in the work list the row, or -1: its dx is 0
    const char* c_rows;   // c, where GATHER
    u32 c_pieces;         // pieces of 16 bytes from row to row
    const float* bias;    // (V,), by entry
    element* dz;        // (slots + 1, 128, 128)
    float* de;          // (N, D), or null
    element* dc;        // (V, width), or null
    const float *mass_e, *norm;
    u32* counters;  // (chunks, 3): blocks at the grid's two barriers, tiles drawn; 0 before the launch
    Formula formula;
    int N, V, D, width, first_chunk, last_chunk, phases;
};

constexpr int COLUMNS_AT_ONCE = 3;  // of the products' tiles
constexpr int SLOT = BLOCK_N * BLOCK_V;
static_assert(BLOCK_N == TILE_N && 2 * BLOCK_V == TILE_V, "two tiles of the filter make one of the product");

/// Tiles of dE and of dC of a chunk, 256 columns wide, numbered consecutively.
struct Products {
    int first, tiles_d, of_e, all;

    __device__ __forceinline__ Products(const Arguments& x, int chunk) {
        first = __ldg(x.plan.chunk_start + chunk);
        const int blocks = __ldg(x.plan.chunk_start + chunk + 1) - first;
        tiles_d = (x.D + TILE_V - 1) / TILE_V;
        const bool any = __ldg(x.plan.items + chunk) > 0;
        of_e = x.de && any ? x.plan.B * tiles_d : 0;
        all = of_e + (x.dc ? blocks * tiles_d : 0);
    }
};

/// One of them: of dE the rows of block ``index``, the longest first; of dC the entries of block ``index``.
struct Product {
    bool of_e;
    int index, column;

    __device__ __forceinline__ Product(const Arguments& x, const Products& all, int nth) {
        of_e = nth < all.of_e;
        int inside = of_e ? nth : nth - all.of_e;
        // A few columns of all blocks, then the next few: what all share of e, or of c, stays in the cache.
        const int blocks = (of_e ? all.of_e : all.all - all.of_e) / all.tiles_d;
        const int first = inside / (blocks * COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE, count = min(all.tiles_d - first, COLUMNS_AT_ONCE);
        inside -= first * blocks;
        column = (first + inside % count) * TILE_V;
        index = of_e ? x.plan.B - 1 - inside / count : all.first + inside / count;
    }
};

/// Its sum: ``count`` live tiles, the first of them at ``list`` of the plan's lists, its slot ``slot`` (of dE).
struct Sum {
    int count, slot;
    i64 list;

    __device__ __forceinline__ Sum(const Arguments& x, const Product& p, int chunk) {
        if (p.of_e) {
            const i64 where = static_cast<i64>(chunk) * x.plan.B + p.index;
            count = __ldg(x.plan.block_tiles + where);
            slot = __ldg(x.plan.block_slot + where);
            list = static_cast<i64>(p.index) * x.plan.T + __ldg(x.plan.block_first + where);
        } else {
            count = __ldg(x.plan.live_count + p.index);
            slot = 0;
            list = static_cast<i64>(p.index) * x.plan.B;
        }
    }
};

/// Item of the plan: one or two live tiles of a row block; it takes two reads, the second of which depends on the
/// first.
struct Item {
    int block, slot, count, first, tile[2];

    __device__ __forceinline__ void look(const Arguments& x, int chunk, int nth) {
        const i64 where = static_cast<i64>(chunk) * x.plan.max_items + nth;
        block = __ldg(x.plan.item_block + where);
        slot = __ldg(x.plan.item_slot + where);
        count = __ldg(x.plan.item_tiles + where);
        first = __ldg(x.plan.item_first + where);
    }

    __device__ __forceinline__ void look_at_tiles(const Arguments& x) {
        const int* list = x.plan.tile_list + static_cast<i64>(block) * x.plan.T + first;
        tile[0] = __ldg(list);
        tile[1] = __ldg(list + (count > 1));
    }
};

/// A chunk with nothing to do in it.
__device__ __forceinline__ bool is_empty(const Arguments& x, int chunk) {
    return __ldg(x.plan.chunk_start + chunk) == __ldg(x.plan.chunk_start + chunk + 1);
}
