// Work on one number a target or a row: as operations of the library, their launches would take longer than all else.
//
// Arguments are numbers of 8 bytes, in the order in which one_pass.py gives them.
#include "pair.cuh"

// Type of the given targets.
#ifndef TARGET_BYTES
#define TARGET_BYTES 8
#endif
#ifndef UNSIGNED
#define UNSIGNED 0
#endif
#if TARGET_BYTES == 8
typedef long long signed_integer;
typedef unsigned long long unsigned_integer;
#elif TARGET_BYTES == 4
typedef int signed_integer;
typedef unsigned unsigned_integer;
#elif TARGET_BYTES == 2
typedef short signed_integer;
typedef unsigned short unsigned_integer;
#else
typedef signed char signed_integer;
typedef unsigned char unsigned_integer;
#endif
#if UNSIGNED
typedef unsigned_integer integer;
#else
typedef signed_integer integer;
#endif

// Function of the CUDA runtime, as assert() calls it.
extern "C" __device__ void __assertfail(
    const char* what, const char* file, unsigned line, const char* function, size_t size);

constexpr int WARPS = 32;  // of a block of join and value

// The sum over a block of 1024 threads, the same bits in each and in each run.
template <class T>
__device__ __forceinline__ T block_sum(T x) {
    __shared__ T sums[WARPS];
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
    if (lane_of_warp() == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : T(0);
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
    return x;
}

struct PrepareArguments {
    const integer* targets;  // count
    long long* out;
    float* weights;  // null, or what one block makes: 1 / the number of targets for each, 0 for none; NaN without any
    long long count, v, ignore_index;
};

// out = targets, -1 for ignore_index; any other outside [0, v) is a device-side assertion.
extern "C" __global__ void __launch_bounds__(1024) prepare_kernel(const __grid_constant__ PrepareArguments p) {
    int mine = 0;
    const long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (long long i = first; i < p.count; i += step) {
        const long long target = p.targets[i];
        const bool inside = target >= 0 && target < p.v, counts = inside && target != p.ignore_index;
        if (!inside && target != p.ignore_index)
            __assertfail("cce: a target outside [0, V) that is not ignore_index", "one_pass.cu", __LINE__, "prepare_kernel", 1);
        p.out[i] = counts ? target : -1;
        mine += counts;
    }
    if (p.weights == nullptr) return;
    const float total = block_sum(mine);
    for (long long i = first; i < p.count; i += step) p.weights[i] = (p.out[i] >= 0 ? 1.0f : 0.0f) / total;
}

struct JoinArguments {
    const float *tile_max, *tile_sum;  // (T, N)
    const float* target_logits;        // (N, K)
    const long long* targets;          // (N, K)
    float *lse, *lse_low, *nll;        // (N,), (N,), (N, K)
    long long N, K, T;
};

// The log-sum-exp of 32 rows from their tiles, in a fixed order, and each target's nll: a warp has every 32nd tile, the
// first warp joins them. 0 where a row has no target.
extern "C" __global__ void __launch_bounds__(1024) join_kernel(const __grid_constant__ JoinArguments p) {
    __shared__ float maxima[WARPS][32], sums[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long row = blockIdx.x * 32ll + lane, read = row < p.N ? row : p.N - 1;
    float m = NEG_INF, s = 0;  // of tiles with a NaN or an infinite maximum s is NaN
#pragma unroll 4
    for (long long t = warp; t < p.T; t += WARPS) {
        const float tile_m = p.tile_max[t * p.N + read], tile_s = p.tile_sum[t * p.N + read];
        const float m_new = fmaxf(m, tile_m), base = finite(m_new);
        s = s * rebased(m, base) + tile_s * rebased(tile_m, base);
        m = m_new;
    }
    maxima[warp][lane] = m;
    sums[warp][lane] = s;
    __syncthreads();
    if (warp != 0 || row >= p.N) return;
    for (int w = 1; w < WARPS; ++w) m = fmaxf(m, maxima[w][lane]);
    const float base = finite(m);
    s = 0;
    for (int w = 0; w < WARPS; ++w) s += sums[w][lane] * rebased(maxima[w][lane], base);
    const long long first = row * p.K;
    const Pair found = join_targets(
        m == INF ? m : maximum_of(m, s), s, p.target_logits + first, p.targets + first, p.K, p.nll + first);
    bool used = false;
    for (long long k = first; k < first + p.K; ++k) used |= p.targets[k] >= 0;
    p.lse[row] = used ? found.lse : 0.0f;
    p.lse_low[row] = used ? found.low : 0.0f;
}

struct ValueArguments {
    const float *weights, *nll;  // (N, K)
    float* value;
    long long count;
};

// sum_ik weights_ik nll_ik. One block.
extern "C" __global__ void __launch_bounds__(1024) value_kernel(const __grid_constant__ ValueArguments p) {
    float total = 0;
    for (long long i = threadIdx.x; i < p.count; i += blockDim.x) total += p.weights[i] * p.nll[i];
    total = block_sum(total);
    if (threadIdx.x == 0) *p.value = total;
}
