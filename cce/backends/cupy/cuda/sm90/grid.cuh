// A barrier of all blocks of a launch, all of which run at the same time: what one wrote, the others' copies may read.
#pragma once

#include "pipeline.cuh"

/// By every thread of the multipliers, when the block's part is done. They do not wait: a block without work may come
/// to later barriers at once, so each has a counter of its own, 0 before the launch.
__device__ __forceinline__ void grid_arrive(u32* count) {
    __threadfence();
    fence_async_proxy();
    asm volatile("bar.sync 4, 256;" ::: "memory");
    if (threadIdx.x == WARPGROUP) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

/// Called by the loading threads: waits until all blocks have arrived.
__device__ __forceinline__ void grid_wait(const u32* count) {
    u32 seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
    } while (seen < gridDim.x);
    fence_async_proxy();
}
