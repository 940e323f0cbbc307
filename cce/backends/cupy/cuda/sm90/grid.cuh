// A barrier of all blocks of a launch, all of which run at the same time: what one wrote, the others' copies may read.
#pragma once

#include "ptx.cuh"

/// By every thread of the multipliers, when the block's part is done: ``count`` blocks have come here, once one more.
__device__ __forceinline__ void grid_arrive(u32* count) {
    __threadfence();
    asm volatile("fence.proxy.async;" ::: "memory");  // ordinary stores come before the copy engine's loads
    asm volatile("bar.sync 4, 256;" ::: "memory");
    if (threadIdx.x == 128) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

/// By the loading thread: until ``expected`` blocks have come.
__device__ __forceinline__ void grid_wait(const u32* count, u32 expected) {
    u32 seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
    } while (seen < expected);
    asm volatile("fence.proxy.async;" ::: "memory");
}
