// z[i, targets[i, k]]: a dot product for each, by a block of threads, so that few rows keep all multiprocessors busy; 0
// where there is none. With COPY, the rows of e that count.
#include "formula.cuh"
#include "numbers.cuh"

#ifndef E_TYPE
#define E_TYPE BFLOAT16
#endif
#ifndef C_TYPE
#define C_TYPE BFLOAT16
#endif
// e is copied, too, with zeros in rows that have no target.
#ifndef COPY
#define COPY 0
#endif

struct TargetsArguments {
    const char *e, *c;  // (N, D), (V, D), any strides
    long long stride_en, stride_ed, stride_cv, stride_cd;  // elements
    const float* bias;  // (V,)
    const long long* targets;  // (N, K)
    float* out;  // (N, K)
    Formula formula;
    int D, K;
    char* used_e;  // (N, D) of the dtype of e, or null
};

constexpr int THREADS = 128, WARPS = THREADS / 32;

// Row i of e, 0 if none of its targets counts; by the block of its first target.
__device__ __forceinline__ void copy_row(const TargetsArguments& p, long long i) {
    bool used = false;
    for (int k = 0; k < p.K; ++k) used |= p.targets[i * p.K + k] >= 0;
#pragma unroll 8
    for (int d = threadIdx.x; d < p.D; d += THREADS) {
        const float x = used ? load_number<E_TYPE>(p.e, i * p.stride_en + d * p.stride_ed) : 0.0f;
        store_number<E_TYPE>(p.used_e, i * p.D + d, x);
    }
}

// The sum of all threads' numbers, in the order of the warps; thread 0 has it.
__device__ __forceinline__ float sum_of_block(float x) {
    __shared__ float sums[WARPS];
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
    if (lane_of_warp() == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += sums[warp];
    return total;
}

extern "C" __global__ void __launch_bounds__(THREADS) target_logits_kernel(const __grid_constant__ TargetsArguments p) {
    const long long where = blockIdx.x, i = where / p.K, target = p.targets[where];
    if constexpr (COPY) {
        if (where % p.K == 0) copy_row(p, i);
    }
    float total = 0;
    if (target >= 0) {
#pragma unroll 8
        for (int d = threadIdx.x; d < p.D; d += THREADS) {
            const float x = load_number<E_TYPE>(p.e, i * p.stride_en + d * p.stride_ed);
            total = fmaf(x, load_number<C_TYPE>(p.c, target * p.stride_cv + d * p.stride_cd), total);
        }
        total = sum_of_block(total);
        total = logit_of(total, BIAS ? p.bias[target] : 0.0f, p.formula);
    }
    if (threadIdx.x == 0) p.out[where] = total;
}
