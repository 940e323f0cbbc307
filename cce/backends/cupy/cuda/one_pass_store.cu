// Logits that are all held at once, stored as q = exp(z - m); m and sum q of each row and tile (one_pass.cuh).
#include "one_pass.cuh"
#include "tiles.cuh"

struct StoreArguments {
    Matrix e, c;  // (N, D), (V, D)
    const float* bias;  // (V,)
    char* q;  // (N, V), the columns of the last tile filled up to eight
    long long pitch;  // elements
    TileSums tiles;
    Formula formula;
    int N, V;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
store_kernel(const __grid_constant__ StoreArguments p) {
    // Tile origin: rows of block i, entries of tile t.
    const Unit unit = unit_of(blockIdx.x, cdiv(p.N, TILE_N), cdiv(p.V, TILE_V));
    const int row0 = unit.i * TILE_N, v0 = unit.t * TILE_V;
    if constexpr (BIAS) {
        for (int column = threadIdx.x; column < TILE_V; column += THREADS)
            tile_bias()[column] = p.bias[min(v0 + column, p.V - 1)];
    }
    // Logit tile, as in the forward.
    const RowRange<TILE_N> read{row0, p.N - 1};
    const RowRange<TILE_V> entries{v0, p.V - 1};
    static_assert(WARPS_V == 1, "a warp has whole rows of the tile");
    float z[J][4];
    logit_tile(z, p.e, read, p.c, entries);
    cap(z, tile_bias(), p.formula);
    if (v0 + TILE_V > p.V) mask(z, p.V - v0, NEG_INF);
    // Epilogue: statistics of the tile, z becomes q.
    const int row = row0 + warp_row() + lane_row(0);
    const bool inside[2] = {row < p.N, row + 8 < p.N};
    keep_tile(z, p.tiles, static_cast<long long>(unit.t) * p.N + row, inside);
    // Store.
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        if (!inside[x]) continue;
        const long long line = (row + 8 * x) * p.pitch + v0 + lane_column(0);
#pragma unroll
        for (int j = 0; j < J; ++j) {
            if (v0 + 8 * j >= p.V) continue;
#if DTYPE == FLOAT32
            reinterpret_cast<float2*>(p.q)[(line + 8 * j) / 2] = make_float2(z[j][2 * x], z[j][2 * x + 1]);
#else
            reinterpret_cast<unsigned*>(p.q)[(line + 8 * j) / 2] = pack_half(z[j][2 * x], z[j][2 * x + 1]);
#endif
        }
    }
}
