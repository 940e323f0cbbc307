// The work list (docs/algorithm.md, step 3): which rows need which tiles, the rows' order, and the live tiles.
//
// A row's tiles are bits of words, 32 vocabulary blocks each: hits (W, N). Nothing here is read by the host.
// MAP_HALF: the map is float16, else float32.
#include "maps.cuh"

struct WorkArguments {
    const void* tile_mass;  // (T, N)
    long long pitch_mass;   // elements
    const float *a, *g, *h;         // (N,), (N, K), (N,) or null: gradients of the outputs
    const int* places;              // (N, K), of targets; -1 for none
    const unsigned char* in_use;    // (N,)
    unsigned* hits;
    int* counts;           // (N,) 0 before: of a row's tiles; T + 1 where it does not count
    unsigned char* keep;   // (N,) the row wants a gradient
    long long* row_order;  // (N,)
    int* row_of;           // (N,) of a place in the order the row, or -1 if it wants no gradient
    unsigned char* live;   // (T, B)
    int N, T, K, B, block_n, block_v, by_count;
};

// Whether a map's mass says that the row needs the block: it is negative, or NaN.
__device__ __forceinline__ bool is_hit(float mass) { return !(mass >= 0); }

// A thread has 32 tiles of a row: hit by the filter's rule or by a target in them. A gradient that is NaN or inf makes all
// of a row's: whatever their mass, none of them may be left out.
extern "C" __global__ void __launch_bounds__(256) hits_kernel(const __grid_constant__ WorkArguments p) {
    const int i = blockIdx.x * 256 + threadIdx.x, t0 = 32 * static_cast<int>(blockIdx.y);
    if (i >= p.N) return;
    const float a = p.a[i], h = p.h ? p.h[i] : 0.0f;
    const bool everywhere = !isfinite(a) || !isfinite(h);
    unsigned hits = 0;
    if (t0 + 32 <= p.T) {
#pragma unroll
        for (int j = 0; j < 32; ++j) hits |= static_cast<unsigned>(is_hit(of_map(p.tile_mass, (t0 + j) * p.pitch_mass + i))) << j;
        if (everywhere) hits = ~0u;
    } else {
        for (int j = 0; t0 + j < p.T; ++j) {
            hits |= static_cast<unsigned>(everywhere || is_hit(of_map(p.tile_mass, (t0 + j) * p.pitch_mass + i))) << j;
        }
    }
    // A row that receives no gradient (a masked token, say) has nothing to compute.
    bool keep = a != 0 || h != 0;
    for (long long k = static_cast<long long>(i) * p.K; k < (i + 1ll) * p.K; ++k) {
        if (p.g[k] == 0) continue;
        keep = true;
        const int place = p.places[k], nth = place / p.block_v - t0;
        if (place >= 0 && nth >= 0 && nth < 32) hits |= 1u << nth;
    }
    if (!keep) hits = 0;
    p.hits[static_cast<long long>(blockIdx.y) * p.N + i] = hits;
    const bool counts = p.in_use[i];
    if (blockIdx.y == 0) {
        p.keep[i] = keep;
        if (!counts) p.counts[i] = p.T + 1;
    }
    if (p.by_count && counts && hits) atomicAdd(p.counts + i, __popc(hits));  // of integers: the order tells nothing
}

// A stable sort by the counts, if there are not too many rows: each lane finds the place of its own, a warp an eighth of
// the others. Rows that do not count come last.
extern "C" __global__ void __launch_bounds__(256) rank_kernel(const __grid_constant__ WorkArguments p) {
    __shared__ int ranks[8][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * 32, i = first + lane;
    const int mine = i < p.N ? p.counts[i] : -1;
    const int4* const fours = reinterpret_cast<const int4*>(p.counts);
    int rank = 0;
#pragma unroll 8
    for (int c = warp; c < p.N / 4; c += 8) {
        const int4 four = __ldg(fours + c);
        const int bound = mine + (4 * c < first);  // of equals those before this block's
        rank += (four.x < bound) + (four.y < bound) + (four.z < bound) + (four.w < bound);
    }
    if (warp == 0) {
        for (int j = p.N / 4 * 4; j < p.N; ++j) rank += p.counts[j] < mine + (j < first);
        rank += __popc(__match_any_sync(~0u, mine) & ((1u << lane) - 1));  // and of this block's
    }
    ranks[warp][lane] = rank;
    __syncthreads();
    if (warp > 0 || i >= p.N) return;
    for (int n = 1; n < 8; ++n) rank += ranks[n][lane];
    p.row_order[rank] = i;
    p.row_of[rank] = p.keep[i] ? i : -1;
}

// The same of an order found elsewhere.
extern "C" __global__ void __launch_bounds__(256) row_of_kernel(const __grid_constant__ WorkArguments p) {
    const int place = blockIdx.x * 256 + threadIdx.x;
    if (place >= p.N) return;
    const int row = static_cast<int>(p.row_order[place]);
    p.row_of[place] = p.keep[row] ? row : -1;
}

// live [T, B]: some row of the block, in the work list's order, needs the tile. A warp has a word of a block.
extern "C" __global__ void __launch_bounds__(256) live_tiles_kernel(const __grid_constant__ WorkArguments p) {
    const int lane = threadIdx.x % 32, word = blockIdx.y * 8 + threadIdx.x / 32, b = blockIdx.x;
    if (32 * word >= p.T) return;
    const unsigned* const hits = p.hits + static_cast<long long>(word) * p.N;
    const int end = min(p.block_n, p.N - b * p.block_n);
    unsigned found = 0;
    for (int r = lane; r < end; r += 32) {
        const int row = p.row_of[b * p.block_n + r];
        if (row >= 0) found |= hits[row];
    }
    found = __reduce_or_sync(~0u, found);
    const int t = 32 * word + lane;
    if (t < p.T) p.live[static_cast<long long>(t) * p.B + b] = found >> lane & 1;
}
