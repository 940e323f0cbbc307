// Numbers of any of the three dtypes, one by one.
#pragma once
#include "options.cuh"

template <int TYPE>
__device__ __forceinline__ float load_number(const char* x, long long where) {
    if constexpr (TYPE == FLOAT32) return reinterpret_cast<const float*>(x)[where];
    const half_word word = reinterpret_cast<const half_word*>(x)[where];
    if constexpr (TYPE == BFLOAT16) return __uint_as_float(static_cast<unsigned>(word) << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(word));
    return value;
}

template <int TYPE>
__device__ __forceinline__ void store_number(char* x, long long where, float value) {
    if constexpr (TYPE == FLOAT32) {
        reinterpret_cast<float*>(x)[where] = value;
        return;
    }
    half_word word;
    if constexpr (TYPE == BFLOAT16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(word) : "f"(value));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(value));
    reinterpret_cast<half_word*>(x)[where] = word;
}
