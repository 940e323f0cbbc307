// Rows and maps on their way into and out of the work list's order, each in one pass over memory.
//
// DTYPE: of the rows of dE that are stored. MAP_HALF: the map is float16, else float32.
#include "dx.cuh"
#include "maps.cuh"
#include "pair.cuh"

struct GatherArguments {
    const uint4* e;  // (any, pieces) of 16 bytes
    const long long* row_order;
    const unsigned char* keep;  // or null
    uint4* out;       // (N, pieces)
    long long pitch;  // pieces
    int N, pieces;
};

// out_i = the row at place i of the order; zeros where no gradient is needed: such a row may be NaN.
extern "C" __global__ void __launch_bounds__(128) gather_rows_kernel(const __grid_constant__ GatherArguments p) {
    const int i = blockIdx.x;
    const long long row = p.row_order[i];
    const bool keep = !p.keep || p.keep[row];
    const uint4* const from = p.e + row * p.pitch;
    uint4* const to = p.out + static_cast<long long>(i) * p.pieces;
#pragma unroll 4
    for (int n = threadIdx.x; n < p.pieces; n += 128) to[n] = keep ? __ldg(from + n) : make_uint4(0, 0, 0, 0);
}

struct ScatterArguments {
    const float* total;  // (N, D), pitch
    const float* norm;   // or null
    const long long* row_order;
    element* out;     // (N, D)
    long long pitch;  // a multiple of 4
    int N, D;
};

// The row at place i of the order = total_i, times norm, rounded.
extern "C" __global__ void __launch_bounds__(128) scatter_rows_kernel(const __grid_constant__ ScatterArguments p) {
    const int i = blockIdx.x;
    const float norm = p.norm ? __ldg(p.norm) : 1.0f;
    const float* const from = p.total + i * p.pitch;
    element* const to = p.out + p.row_order[i] * p.D;
    if (p.D % 4 == 0) {
#pragma unroll 4
        for (int d = 4 * threadIdx.x; d < p.D; d += 512) {
            const float4 x = __ldg(reinterpret_cast<const float4*>(from + d));
#if DTYPE == FLOAT32
            *reinterpret_cast<float4*>(to + d) = make_float4(x.x * norm, x.y * norm, x.z * norm, x.w * norm);
#else
            *reinterpret_cast<uint2*>(to + d) = make_uint2(pack(x.x * norm, x.y * norm), pack(x.z * norm, x.w * norm));
#endif
        }
        return;
    }
    for (int d = threadIdx.x; d < p.D; d += 128) {
#if DTYPE == FLOAT32
        to[d] = from[d] * norm;
#else
        to[d] = static_cast<half_word>(pack(from[d] * norm, 0) & 0xffff);
#endif
    }
}

struct JoinArguments {
    const float *max, *sum;      // (S, N)
    const float* target_logits;  // (N, K)
    const long long* targets;    // (N, K), -1 for none
    const unsigned char* in_use;
    float *lse, *lse_low, *nll;  // (N,), (N,), (N, K)
    int N, S, K;
};

// The splits' log-sum-exp, joined in ascending order, and each target's nll; 0 of rows that do not count.
extern "C" __global__ void __launch_bounds__(64) joined_kernel(const __grid_constant__ JoinArguments p) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i >= p.N) return;
    float most = NEG_INF;
    bool odd = false;  // a maximum that is NaN
#pragma unroll 8
    for (int s = 0; s < p.S; ++s) {
        const float m = __ldg(p.max + static_cast<long long>(s) * p.N + i);
        odd = odd || m != m;
        most = fmaxf(most, m);
    }
    const float base = finite(most);
    float sum = 0;
#pragma unroll 8
    for (int s = 0; s < p.S; ++s) {
        const long long where = static_cast<long long>(s) * p.N + i;
        sum += rebased(__ldg(p.max + where), base) * __ldg(p.sum + where);
    }
    const long long first = static_cast<long long>(i) * p.K;
    // A maximum may leave NaN out, a sum does not; but inf is the log-sum-exp, whatever the sum is.
    const float m = odd ? NOT_A_NUMBER : most == INF ? most : maximum_of(most, sum);
    const Pair found = join_targets(m, sum, p.target_logits + first, p.targets + first, p.K, p.nll + first);
    const bool counts = p.in_use[i];
    p.lse[i] = counts ? found.lse : 0.0f;
    p.lse_low[i] = counts ? found.low : 0.0f;
    for (int k = 0; !counts && k < p.K; ++k) p.nll[first + k] = 0;
}

struct FillArguments {
    const float *tile_max, *tile_log_sum, *tile_entropy;  // (any, N); entropy or null
    const float *lse, *lse_low;                           // (N,)
    const unsigned char* in_use;                          // (N,)
    void *mass, *entropy;                                 // (T, N), pitches
    long long pitch_mass, pitch_entropy;
    float log_threshold, least;
    int by_maximum, N, T;
};

// mass = exp((max - lse) + (log_sum - lse_low)), negated and at least ``least`` unless the filter's quantity, by_maximum
// (max - lse) - lse_low, else the mass's logarithm, is at most the threshold: if it is NaN, too. 0 of rows that do not
// count. A thread has sixteen tiles of a row.
extern "C" __global__ void __launch_bounds__(256) fill_maps_kernel(const __grid_constant__ FillArguments p) {
    constexpr int TILES = 16;
    const int i = blockIdx.x * 256 + threadIdx.x, t0 = blockIdx.y * TILES;
    if (i >= p.N) return;
    const bool counts = p.in_use[i];
    const float lse = p.lse[i], low = p.lse_low[i];
#pragma unroll 8
    for (int t = t0; t < min(t0 + TILES, p.T); ++t) {
        const long long from = static_cast<long long>(t) * p.N + i;
        const float below = p.tile_max[from] - lse, log_mass = below + (p.tile_log_sum[from] - low);
        float mass = expf(log_mass);
        if (!((p.by_maximum ? below - low : log_mass) <= p.log_threshold)) mass = -fmaxf(mass, p.least);
        to_map(p.mass, t * p.pitch_mass + i, counts ? mass : 0.0f);
        if (p.entropy) to_map(p.entropy, t * p.pitch_entropy + i, counts ? p.tile_entropy[from] : 0.0f);
    }
}
