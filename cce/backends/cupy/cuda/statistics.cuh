// Epilogue of the forward: what a split of the vocabulary has found of a row, and a tile's logits added to it.
//
// Steps 1 and 2 of docs/algorithm.md. Without maps each lane keeps the statistics of the columns it holds, and the four
// lanes of a row join theirs once, at the end of the split; with maps they agree on a maximum for every block.
#pragma once
#include "formula.cuh"

// m = largest logit, s = sum exp(z - m), gap = sum exp(z - m) (m - z), weighted = sum u z, best = first place of m.
struct RowStatistics {
    float m, s, gap, weighted;
    int best;
};

// (S, N) each; null where not wanted.
struct Splits {
    float *max, *sum, *gap, *weighted;
    int* best;
};

// (T', N) each; a block's log-sum-exp is max + log_sum.
struct Tiles {
    float *max, *log_sum, *entropy;
};

// Initial state of the split: empty, or with ``carry`` its results from earlier windows. ``where``: split * N + row.
__device__ __forceinline__ RowStatistics begin(const Splits& splits, long long where, bool carry) {
    RowStatistics row = {NEG_INF, 0, 0, 0, 0};
    if (!carry) return row;
    row.m = splits.max[where];
    if constexpr (PREDICTION) row.best = splits.best[where];
    if (lane_of_warp() % 4 == 0) {  // sums are those of the lanes together
        row.s = row.m == INF ? INF : splits.sum[where];
        if constexpr (ENTROPY) row.gap = splits.gap[where];
        if constexpr (WEIGHTED) row.weighted = splits.weighted[where];
    }
    return row;
}

// Sum and gap about another maximum.
__device__ __forceinline__ void rescale(RowStatistics& row, float safe) {
    const float factor = rebased(row.m, safe);  // 0 for the first tile, where m = -inf
    if constexpr (ENTROPY) row.gap = row.s > 0 ? (row.gap + row.s * (safe - row.m)) * factor : 0.0f;
    row.s *= factor;
}

// Adds JB accumulators from j0, one block of the map or, without maps, the whole tile, to the statistics of row x.
// ``place`` of their first column; ``where``: place / BLOCK_V * N + row of the maps, not stored unless ``inside``.
template <int J, int JB>
__device__ __forceinline__ void add_block(
    const float (&z)[J][4], int j0, int x, int place, RowStatistics& row, const Tiles& tiles, long long where, bool inside) {
    float tile_m = NEG_INF;
#pragma unroll
    for (int j = j0; j < j0 + JB; ++j) tile_m = fmaxf(tile_m, fmaxf(z[j][2 * x], z[j][2 * x + 1]));
    if constexpr (MAPS) tile_m = quad_max(tile_m);
    const float m_new = fmaxf(row.m, tile_m);
    const float safe = finite(m_new);
    const float shift = ONLINE || !MAPS || is_infinite(tile_m) ? safe : tile_m;

    // p = exp(z - shift); s = sum p; gap = sum p (shift - z), every term of which is at least 0, and 0 where p is.
    float tile_s = 0, tile_gap = 0;
#pragma unroll
    for (int j = j0; j < j0 + JB; ++j) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            const float value = z[j][2 * x + y], p = exp_of(value, shift);
            tile_s += p;
            if constexpr (ENTROPY) tile_gap -= p * fmaxf(__fsub_rn(value, shift), -1e4f);
        }
    }
    if constexpr (PREDICTION) {
        int column = 0x7fffffff;  // of the first largest
#pragma unroll
        for (int j = j0 + JB - 1; j >= j0; --j) {
#pragma unroll
            for (int y = 1; y >= 0; --y) {
                if (z[j][2 * x + y] == tile_m) column = 8 * (j - j0) + lane_column(y);
            }
        }
        if constexpr (MAPS) column = quad_min(column);
        if (tile_m > row.m) row.best = place + column;
    }
    if constexpr (MAPS) {
        const float all_s = quad_sum(tile_s);
        const float all_gap = TILE_ENTROPY ? quad_sum(tile_gap) : 0.0f;
        if (inside && lane_of_warp() % 4 == 0) {
            const float log_s = log2_of(all_s) * LN2;
            tiles.max[where] = maximum_of(tile_m, all_s);
            tiles.log_sum[where] = tile_m == NEG_INF && all_s == 0 ? 0.0f : log_s + (shift - tile_m);
            if constexpr (TILE_ENTROPY) tiles.entropy[where] = all_s == 0 ? 0.0f : log_s + all_gap / all_s;
        }
    }
    rescale(row, safe);
    const float factor = rebased(shift, safe);  // 1 where they are the same
    if constexpr (ENTROPY) row.gap += (tile_gap + tile_s * (safe - shift)) * factor;
    row.s += tile_s * factor;
    row.m = m_new;
}

// weighted += u z of the warp's columns; 0 times -inf is NaN, as in PyTorch.
template <int J>
__device__ __forceinline__ void add_weighted(const float (&z)[J][4], RowStatistics (&rows)[2], const float* weight) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            const float u = weight[8 * j + lane_column(y)];
#pragma unroll
            for (int x = 0; x < 2; ++x) rows[x].weighted += z[j][2 * x + y] * u;
        }
    }
}

// Epilogue of a tile of ``columns`` columns, all there are or fewer: its weighted sum, and its statistics, stored in blocks
// of BLOCK_V if there are maps, added to those of the lane's two rows. ``weight``: u of the warp's 8 J columns, in shared
// memory, 0 behind the last; ``place`` of the first column in the vocabulary; ``row0``: the warp's first row.
template <int J>
__device__ __forceinline__ void add_tile(
    float (&z)[J][4], int columns, RowStatistics (&rows)[2], const float* weight, int place, int row0, int N,
    const Tiles& tiles) {
    const bool is_ragged = columns < 8 * J;
    if constexpr (WEIGHTED) {
        if (is_ragged) mask(z, columns, 0.0f);  // columns after the last may be inf, and 0 times that is NaN
        add_weighted(z, rows, weight);
    }
    if (is_ragged) mask(z, columns, NEG_INF);
    constexpr int JB = MAPS ? BLOCK_V / 8 : J;
    static_assert(J % JB == 0, "a tile is whole blocks of the map");
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        const int row = row0 + lane_row(x);
#pragma unroll
        for (int j0 = 0; j0 < J; j0 += JB) {
            const int first = place + 8 * j0;
            const long long where = MAPS ? static_cast<long long>(first / BLOCK_V) * N + row : 0;
            add_block<J, JB>(z, j0, x, first, rows[x], tiles, where, row < N);
        }
    }
}

// Joins the four lanes of a row; all of them then hold the same.
__device__ __forceinline__ void join(RowStatistics& row) {
    const float m = quad_max(row.m);
    if constexpr (PREDICTION) row.best = quad_min(row.m == m ? row.best : 0x7fffffff);
    rescale(row, finite(m));
    row.m = m;
    row.s = quad_sum(row.s);
    if constexpr (ENTROPY) row.gap = quad_sum(row.gap);
    if constexpr (WEIGHTED) row.weighted = quad_sum(row.weighted);
}

// Store: one number per row and split. Here the sum relative to 0 has distinguished an infinite maximum from NaN;
// relative to inf it is NaN.
__device__ __forceinline__ void store(const RowStatistics& row, const Splits& splits, long long where) {
    splits.max[where] = maximum_of(row.m, row.s);
    splits.sum[where] = row.m == INF ? NOT_A_NUMBER : row.s;
    if constexpr (ENTROPY) splits.gap[where] = row.gap;
    if constexpr (WEIGHTED) splits.weighted[where] = row.weighted;
    if constexpr (PREDICTION) splits.best[where] = row.best;
}
