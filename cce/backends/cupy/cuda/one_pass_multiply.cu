// Two tensors times a number, in place: most often it is 1, and nothing is read or written.
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
    long long x_count, y_count;
};

// A thread takes 16 bytes at a time, and the rest at the end one element at a time.
template <int TYPE>
__device__ __forceinline__ void multiply_one(char* x, long long count, float by) {
    constexpr int EACH = TYPE == FLOAT32 ? 4 : 8;
    const long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x, whole = count / EACH;
    for (long long i = first; i < whole; i += step) {
        uint4 words = reinterpret_cast<uint4*>(x)[i];
        char* const each = reinterpret_cast<char*>(&words);
#pragma unroll
        for (int n = 0; n < EACH; ++n) store_number<TYPE>(each, n, load_number<TYPE>(each, n) * by);
        reinterpret_cast<uint4*>(x)[i] = words;
    }
    const long long last = whole * EACH + first;
    if (last < count) store_number<TYPE>(x, last, load_number<TYPE>(x, last) * by);
}

extern "C" __global__ void __launch_bounds__(256) multiply_kernel(const __grid_constant__ MultiplyArguments p) {
    const float by = *p.factor;
    if (by == 1.0f) return;
    multiply_one<X_TYPE>(p.x, p.x_count, by);
    multiply_one<Y_TYPE>(p.y, p.y_count, by);
}
