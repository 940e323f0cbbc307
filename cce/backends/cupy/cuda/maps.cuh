// The maps of the forward: float16, or float32 (MAP_HALF 0).
#pragma once
#include "options.cuh"

#ifndef MAP_HALF
#define MAP_HALF 0
#endif

__device__ __forceinline__ float of_half(half_word x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
    return value;
}

__device__ __forceinline__ half_word to_half(float x) {
    half_word value;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value) : "f"(x));
    return value;
}

__device__ __forceinline__ float of_map(const void* map, long long where) {
#if MAP_HALF
    return of_half(static_cast<const half_word*>(map)[where]);
#else
    return static_cast<const float*>(map)[where];
#endif
}

__device__ __forceinline__ void to_map(void* map, long long where, float x) {
#if MAP_HALF
    static_cast<half_word*>(map)[where] = to_half(x);
#else
    static_cast<float*>(map)[where] = x;
#endif
}
