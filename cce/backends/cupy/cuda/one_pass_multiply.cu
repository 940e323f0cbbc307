// Two tensors times a number, in place: most often it is 1, and neither is read or written.
//
// Whatever they hold and the number is, rows of x without a target become 0; and all of both where no row has one and
// the number is not finite.
#include "numbers.cuh"

#ifndef X_TYPE
#define X_TYPE BFLOAT16
#endif
#ifndef Y_TYPE
#define Y_TYPE BFLOAT16
#endif

struct MultiplyArguments {
    char *x, *y;  // contiguous
    const float* factor;
    const long long* targets;  // (N, K)
    long long x_count, y_count, N, K, D;  // D: width of the rows of x that belong to targets; 0 if they do not
};

// Whether one of ``count`` targets is an entry; asked by all threads of the block.
__device__ __forceinline__ bool is_used(const long long* targets, long long count) {
    bool found = false;
    for (long long i = threadIdx.x; i < count; i += blockDim.x) found |= targets[i] >= 0;
    return __syncthreads_or(found);
}

// Rows with a target times ``by``, and 0 for the others.
template <int TYPE>
__device__ __forceinline__ void multiply_rows(const MultiplyArguments& p, float by) {
    for (long long row = blockIdx.x; row < p.N; row += gridDim.x) {
        const bool used = is_used(p.targets + row * p.K, p.K);
        if (used && by == 1.0f) continue;
        for (long long i = row * p.D + threadIdx.x; i < (row + 1) * p.D; i += blockDim.x) {
            store_number<TYPE>(p.x, i, used ? load_number<TYPE>(p.x, i) * by : 0.0f);
        }
    }
}

// A thread takes 16 bytes at a time, and the rest at the end one element at a time; ``clear``: all become 0.
template <int TYPE>
__device__ __forceinline__ void multiply_one(char* x, long long count, float by, bool clear) {
    constexpr int EACH = TYPE == FLOAT32 ? 4 : 8;
    const long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x, whole = count / EACH;
    for (long long i = first; i < whole; i += step) {
        uint4 words = reinterpret_cast<uint4*>(x)[i];
        char* const each = reinterpret_cast<char*>(&words);
#pragma unroll
        for (int n = 0; n < EACH; ++n) store_number<TYPE>(each, n, clear ? 0.0f : load_number<TYPE>(each, n) * by);
        reinterpret_cast<uint4*>(x)[i] = words;
    }
    const long long last = whole * EACH + first;
    if (last < count) store_number<TYPE>(x, last, clear ? 0.0f : load_number<TYPE>(x, last) * by);
}

extern "C" __global__ void __launch_bounds__(256) multiply_kernel(const __grid_constant__ MultiplyArguments p) {
    const float by = *p.factor;
    if (p.D > 0) multiply_rows<X_TYPE>(p, by);
    if (by == 1.0f) return;
    const bool clear = !isfinite(by) && !is_used(p.targets, p.N * p.K);
    if (p.D == 0) multiply_one<X_TYPE>(p.x, p.x_count, by, clear);
    multiply_one<Y_TYPE>(p.y, p.y_count, by, clear);
}
