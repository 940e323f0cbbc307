// A warp's 16 x 256 accumulator to memory in 16 bits, in whole pieces of 16 bytes a thread.
#pragma once

#include "../dx.cuh"
#include "../one_pass.cuh"
#include "ptx.cuh"

/// Among four lanes: lane q's nth word becomes lane n's qth.
__device__ __forceinline__ void transpose_quad(u32 (&word)[4]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 got = __shfl_xor_sync(~0u, odd ? word[i] : word[i + 1], 1);
        if (odd) word[i] = got;
        else word[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 got = __shfl_xor_sync(~0u, high ? word[i] : word[i + 2], 2);
        if (high) word[i] = got;
        else word[i + 2] = got;
    }
}

/// Eight numbers at ``to``, a multiple of 16 bytes.
__device__ __forceinline__ void store_eight(element* to, const u32 (&word)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

/// The first ``room`` of them, at the most.
__device__ __forceinline__ void store_some(element* to, const u32 (&word)[4], int room) {
    if (room >= 8) {
        store_eight(to, word);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (2 * i + 1 < room) *reinterpret_cast<u32*>(to + 2 * i) = word[i];
        else if (2 * i < room) to[2 * i] = static_cast<element>(word[i]);
    }
}

/// Columns 8 j0 to 8 (j0 + JB) of the lane's two rows, from ``to[x] + 8 j0`` on where ``inside[x]``; a WHOLE tile, or
/// no columns from ``to[x] + room`` on. In float16 if it is HALF, else in the products' dtype.
template <int JB, bool WHOLE, bool HALF = false>
__device__ __forceinline__ void store_rows(
    const float (&z)[32][4], int j0, element* const (&to)[2], int room, const bool (&inside)[2]) {
    static_assert(JB % 4 == 0, "a lane gets eight columns of four accumulators");
    const int mine = 8 * (lane_of_warp() % 4);
#pragma unroll
    for (int j = j0; j < j0 + JB; j += 4) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            u32 word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float low = z[j + i][2 * x], high = z[j + i][2 * x + 1];
                word[i] = HALF ? pack_half(low, high) : pack(low, high);
            }
            transpose_quad(word);
            if (!inside[x]) continue;
            if constexpr (WHOLE)
                store_eight(to[x] + 8 * j + mine, word);
            else
                store_some(to[x] + 8 * j + mine, word, room - 8 * j - mine);
        }
    }
}
