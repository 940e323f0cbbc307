// z[i, targets[i, k]]: a dot product for each, by one warp; 0 where there is none.
#include "formula.cuh"

#ifndef E_TYPE
#define E_TYPE BFLOAT16
#endif
#ifndef C_TYPE
#define C_TYPE BFLOAT16
#endif

struct TargetsArguments {
    const char *e, *c;  // (N, D), (V, D), any strides
    long long stride_en, stride_ed, stride_cv, stride_cd;  // elements
    const float* bias;  // (V,)
    const long long* targets;  // (N, K)
    float* out;  // (N, K)
    Formula formula;
    long long count;  // N K
    int D, K;
};

template <int TYPE>
__device__ __forceinline__ float load(const char* x, long long where) {
    if constexpr (TYPE == FLOAT32) return reinterpret_cast<const float*>(x)[where];
    const half_word word = reinterpret_cast<const half_word*>(x)[where];
    if constexpr (TYPE == BFLOAT16) return __uint_as_float(static_cast<unsigned>(word) << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(word));
    return value;
}

extern "C" __global__ void __launch_bounds__(256) targets_kernel(const __grid_constant__ TargetsArguments p) {
    const long long where = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (where >= p.count) return;
    const long long i = where / p.K, target = p.targets[where];
    float total = 0;
    if (target >= 0) {
#pragma unroll 8
        for (int d = lane_of_warp(); d < p.D; d += 32) {
            const float x = load<E_TYPE>(p.e, i * p.stride_en + d * p.stride_ed);
            total = fmaf(x, load<C_TYPE>(p.c, target * p.stride_cv + d * p.stride_cd), total);
        }
        for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffff, total, lanes);
        // As the tiles have it: z = softcap tanh(scale (x + bias) / softcap).
        if constexpr (BIAS) total += p.bias[target];
        if constexpr (SOFTCAP) {
            const float y = exp2_of(total * (2 * p.formula.scale / p.formula.softcap * LOG2E));
            total = p.formula.softcap - 2 * p.formula.softcap * reciprocal(1 + y);
        } else if constexpr (SCALE) {
            total *= p.formula.scale;
        }
    }
    if (lane_of_warp() == 0) p.out[where] = total;
}
