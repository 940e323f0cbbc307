// The skeleton of all products on sm_90: one warp loads boxes into a ring of stages, two warpgroups multiply them.
//
// A block of 384 threads computes tiles of 128 rows and 256 columns. Warpgroup 0 gives its registers away and has one
// thread that starts copies; warpgroups 1 and 2 hold the accumulator of 64 rows each. A stage is 64 deep: 16 KB of a
// and 32 KB of b; there are STAGES (a macro, as CLUSTER). Blocks of a cluster work on neighbouring rows and the same
// columns: each loads a part of b for all.
#pragma once

#include "wgmma.cuh"

// Rows of c are anywhere: all threads of the loading warpgroup copy them, not the copy engine.
#ifndef GATHER
#define GATHER 0
#endif

constexpr int THREADS = 3 * WARPGROUP;
constexpr int TILE_N = 128;
constexpr int TILE_V = 256;
constexpr int DEPTH = 64;  // elements: 128 bytes, as wide as the swizzle
constexpr u32 BOX = 64 * 128;  // bytes of 64 rows of a box
constexpr u32 A_BYTES = 2 * BOX;
constexpr u32 B_BYTES = 4 * BOX;
constexpr u32 STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int PRODUCER_REGISTERS = GATHER ? 56 : 40;
constexpr int CONSUMER_REGISTERS = GATHER ? 224 : 232;
static_assert(24 * STAGES + 8 <= 128, "room for the barriers and messages");

/// Position in the ring: a stage and the parity of its round.
struct Ring {
    u32 stage = 0;
    u32 parity = 0;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/// Shared memory begins at a multiple of 1024 bytes for the swizzle; the launch gives 1024 bytes more than are used.
__device__ __forceinline__ u32 aligned_shared() {
    extern __shared__ char memory[];
    u32 address;
    // Asked for anew by each role: a number kept for both would take a register from the one that has few.
    asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(shared_address(memory)));
    return (address + 1023) & ~1023u;
}

/// Shared memory of a block: the stages, then a barrier "full" and a barrier "empty" of each, then what a kernel adds.
struct Pipeline {
    u32 base = aligned_shared();

    __device__ __forceinline__ u32 a(u32 stage) const { return base + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 b(u32 stage) const { return a(stage) + A_BYTES; }
    __device__ __forceinline__ u32 full(u32 stage) const { return base + STAGES * STAGE_BYTES + 8 * stage; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full(stage) + 8 * STAGES; }
    /// Message of the loading to the multiplying side with a stage: two numbers. After them two more, for the loading
    /// side.
    __device__ __forceinline__ u32 message(u32 stage) const { return full(2 * STAGES) + 8 * stage; }
    __device__ __forceinline__ u32 rest() const { return full(0) + 128; }

    /// All threads of all blocks of the cluster.
    __device__ __forceinline__ void start() const {
        if (threadIdx.x == 0) {
            for (int s = 0; s < STAGES; ++s) {
                barrier_init(full(s), GATHER ? 1 + WARPGROUP : 1);
                barrier_init(empty(s), CLUSTER * 8);  // every warp of the multipliers, of every block
            }
            barrier_init_fence();
        }
        cluster_sync();
    }

    /// By the loading thread: waits until the stage is free; the barrier that its copies are to tell.
    __device__ __forceinline__ u32 claim(const Ring& ring) const {
        barrier_wait(empty(ring.stage), ring.parity ^ 1);
        barrier_expect(full(ring.stage), STAGE_BYTES);
        return full(ring.stage);
    }

    /// By a warp of the multipliers: the message that comes with the stage, when it is there.
    __device__ __forceinline__ int2 read_message(const Ring& ring) const {
        barrier_wait(full(ring.stage), ring.parity);
        // Read by the lane that returns the stage: no other may still read when the next message is written.
        int2 found = {0, 0};
        if (threadIdx.x % 32 == 0) found = load_shared_two(message(ring.stage));
        return make_int2(__shfl_sync(~0u, found.x, 0), __shfl_sync(~0u, found.y, 0));
    }

    /// By a warp: its warpgroup has read the stage for the last time, here and what came from the other blocks.
    __device__ __forceinline__ void release(u32 stage) const {
        const u32 lane = threadIdx.x % 32;
        if constexpr (CLUSTER == 1) {
            if (lane == 0) barrier_arrive(empty(stage));
        } else {
            if (lane < CLUSTER) barrier_arrive(empty(stage), lane);
        }
    }
};

/// TILE_V rows of b along k from row y, columns x to x + DEPTH: this block's part of them, for all of the cluster.
__device__ __forceinline__ void load_part(u32 to, const TensorMap& map, int x, int y, u32 barrier, int rank) {
    if constexpr (CLUSTER == 1) {
        load_box(to, map, x, y, barrier);
    } else {
        constexpr int PART = TILE_V / CLUSTER;
        load_box(to + rank * PART * DEPTH * 2, map, x, y + rank * PART, barrier, static_cast<u16>((1 << CLUSTER) - 1));
    }
}

/// acc = the product over ``steps`` stages, by warpgroup ``half`` (0 or 1) of the multipliers.
///
/// One group of instructions stays in flight from step to step; a stage is released when the group that reads it is
/// done, one step later.
template <bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void multiply(
    float (&acc)[32][4], const Pipeline& pipe, Ring& ring, int half, int steps) {
    u32 last = ring.stage;
    for (int step = 0; step < steps; ++step) {
        barrier_wait(pipe.full(ring.stage), ring.parity);
        if constexpr (GATHER) fence_async_proxy_shared();
        const u64 a = descriptor(pipe.a(ring.stage) + half * BOX);
        const u64 b = descriptor(pipe.b(ring.stage), B_ACROSS ? BOX : 16);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DEPTH / STEP_K; ++k)
            wgmma<A_ACROSS, B_ACROSS>(acc, a + k * NEXT_K<A_ACROSS>, b + k * NEXT_K<B_ACROSS>, step > 0 || k > 0);
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            pipe.release(last);
        }
        last = ring.stage;
        ring.next();
    }
    wgmma_wait<0>();
    settle(acc);
    if (steps > 0) pipe.release(last);
}
