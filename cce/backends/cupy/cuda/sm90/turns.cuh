// All tiles of a product of some rows and a window of the vocabulary, taken by clusters in turn.
//
// A tile has CLUSTER x 128 rows and 256 columns; GROUP row blocks are at work side by side, so that they share what they
// read of c.
#pragma once

#include "pipeline.cuh"

/// Row block and tile of a turn.
struct Turn {
    int row_block, tile;

    __device__ __forceinline__ Turn(int turn, int blocks, int tiles) {
        const int group = turn / (GROUP * tiles);
        const int inside = turn - group * GROUP * tiles;
        const int size = min(blocks - group * GROUP, GROUP);
        row_block = group * GROUP + inside % size;
        tile = inside / size;
    }
};

/// The loading thread: boxes of e and c, in the order in which they are multiplied.
template <class Arguments>
__device__ __forceinline__ void load_turns(const Arguments& x) {
    const int rank = cluster_rank();
    const int blocks = (x.N + CLUSTER * TILE_N - 1) / (CLUSTER * TILE_N);
    const int tiles = (x.V + TILE_V - 1) / TILE_V;
    const int steps = (x.D + DEPTH - 1) / DEPTH;
    const Pipeline pipe;
    Ring ring;
    for (int turn = blockIdx.x / CLUSTER; turn < blocks * tiles; turn += gridDim.x / CLUSTER) {
        const Turn at(turn, blocks, tiles);
        const int row0 = (at.row_block * CLUSTER + rank) * TILE_N;
        for (int step = 0; step < steps; ++step) {
            const u32 full = pipe.claim(ring);
            load_box(pipe.a(ring.stage), x.e_map, step * DEPTH, row0, full);
            load_part(pipe.b(ring.stage), x.c_map, step * DEPTH, at.tile * TILE_V, full, rank);
            ring.next();
        }
    }
}
