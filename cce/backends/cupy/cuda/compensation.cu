// Compensation for the dead tiles (docs/algorithm.md, step 5): their mass, and the mean row of each vocabulary block.
//
// MAP_HALF: the maps are float16, else float32.
#include "dx.cuh"
#include "maps.cuh"

#if DTYPE == FLOAT32
constexpr int PIECE = 4;  // elements of 16 bytes
__device__ __forceinline__ void unpack(const uint4& x, float (&to)[PIECE]) {
    const unsigned words[4] = {x.x, x.y, x.z, x.w};
    for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(words[i]);
}
__device__ __forceinline__ uint4 packed(const float (&x)[PIECE]) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
__device__ __forceinline__ element rounded(float x) { return x; }
#else
constexpr int PIECE = 8;
__device__ __forceinline__ void unpack(const uint4& x, float (&to)[PIECE]) {
    const unsigned words[4] = {x.x, x.y, x.z, x.w};
    for (int i = 0; i < 4; ++i) {
#if DTYPE == FLOAT16
        to[2 * i] = of_half(words[i] & 0xffff);
        to[2 * i + 1] = of_half(words[i] >> 16);
#else
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
#endif
    }
}
__device__ __forceinline__ uint4 packed(const float (&x)[PIECE]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}
__device__ __forceinline__ element rounded(float x) { return static_cast<element>(pack(x, 0)); }
#endif

struct MeanArguments {
    const char* c;           // (V, D) aligned
    long long pitch;         // bytes
    const long long* order;  // (V,) or null
    char* out;               // (blocks, D)
    int V, pieces, block_v, first;
};

// out_t = the mean of the rows of c of vocabulary block first + t: a thread adds 16 bytes of each, in their order.
extern "C" __global__ void __launch_bounds__(128) mean_rows_kernel(const __grid_constant__ MeanArguments p) {
    const int piece = blockIdx.y * 128 + threadIdx.x;
    if (piece >= p.pieces) return;
    const int place0 = (p.first + static_cast<int>(blockIdx.x)) * p.block_v, rows = min(p.block_v, p.V - place0);
    const char* c = p.c + 16ll * piece;
    float sum[PIECE] = {};
#pragma unroll 8
    for (int i = 0; i < rows; ++i) {
        const long long entry = p.order ? __ldg(p.order + place0 + i) : place0 + i;
        float values[PIECE];
        unpack(__ldg(reinterpret_cast<const uint4*>(c + entry * p.pitch)), values);
        for (int j = 0; j < PIECE; ++j) sum[j] += values[j];
    }
    for (int j = 0; j < PIECE; ++j) sum[j] /= rows;
    reinterpret_cast<uint4*>(p.out)[static_cast<long long>(blockIdx.x) * p.pieces + piece] = packed(sum);
}

struct MassArguments {
    const void *tile_mass, *tile_entropy;  // (T, N)
    long long pitch_mass, pitch_entropy;   // elements
    const unsigned char* live;             // (T, B)
    const long long* row_order;
    const float *lse, *entropy, *a, *h;  // (N,); a and h have been multiplied by the scale
    element* out;  // (tiles, N)
    float softcap;
    int N, V, B, block_n, block_v, first;
};

// out_ti = softcap'(zbar) p (a + h (tile_entropy - log p - H)) of dead tiles, p their mass; 0 of live ones.
// zbar, the log of the tile's mean exp(z), stands for its logits. Columns i are rows in the work list's order.
extern "C" __global__ void __launch_bounds__(256) dead_mass_kernel(const __grid_constant__ MassArguments p) {
    const int tile = blockIdx.x, t = p.first + tile;
    const float log_columns = log2_of(static_cast<float>(min(p.block_v, p.V - t * p.block_v))) * LN2;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const int i = (blockIdx.y * 4 + n) * 256 + threadIdx.x;
        if (i >= p.N) return;
        float total = 0;
        if (!p.live[static_cast<long long>(t) * p.B + i / p.block_n]) {
            const long long row = p.row_order[i];
            const float given = of_map(p.tile_mass, t * p.pitch_mass + row), mass = given < 0 ? 0.0f : given;  // NaN stays
            const float log_mass = log2_of(mass) * LN2;
            float weight = p.a[row];
            if constexpr (ENTROPY) {
                const float own = of_map(p.tile_entropy, t * p.pitch_entropy + row);
                weight += p.h[row] * (own - fmaxf(log_mass, -1e4f) - p.entropy[row]);
            }
            total = mass * weight;
            if constexpr (SOFTCAP) {
                const float ratio = (log_mass + p.lse[row] - log_columns) / p.softcap;
                const float clamped = fminf(fmaxf(ratio, -1.0f), 1.0f);
                total *= 1 - clamped * clamped;
            }
        }
        p.out[static_cast<long long>(tile) * p.N + i] = rounded(total);
    }
}
