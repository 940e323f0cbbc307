// The matrix unit: acc += a b of 64 rows and 256 columns, both factors in shared memory.
//
// Factors lie in boxes of 64 elements (128 bytes) by some rows, as the copy engine writes them with the 128-byte
// swizzle: the 16-byte piece p of row r lies at place p ^ (r % 8) of its row; boxes begin at multiples of 1024 bytes.
// A factor is "along k" where a row of its boxes runs along the summation, "across" where a row is one k.
#pragma once

#include "ptx.cuh"

#include "../options.cuh"

#if DTYPE == FLOAT16
#define OPERAND "f16"
#else
#define OPERAND "bf16"
#endif

constexpr int WARPGROUP = 128;
constexpr int STEP_K = 16;  // of one instruction

/// The descriptor of a factor that begins at a multiple of 1024 bytes. # PTX ISA, "Matrix descriptor"
///
/// Along k: 8 rows to the next take 1024 bytes. Across: the next 8 k follow after 1024 bytes, the next 64 columns
/// after ``panel`` bytes.
__device__ __forceinline__ u64 descriptor(u32 address, u32 panel = 16) {
    constexpr u64 SWIZZLE_128 = 1ull << 62;
    constexpr u64 EIGHT_ROWS = u64(1024 >> 4) << 32;
    return SWIZZLE_128 | EIGHT_ROWS | (u64(panel >> 4) << 16) | u64((address & 0x3FFFF) >> 4);
}

/// Increment of a descriptor that advances it by STEP_K in k.
template <bool ACROSS>
constexpr u64 NEXT_K = (ACROSS ? 2 * 1024 : STEP_K * 2) >> 4;

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until at most PENDING groups have not completed.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/// Nothing of the accumulator is read before this place of the program.
template <int J>
__device__ __forceinline__ void settle(float (&acc)[J][4]) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[j][i])::"memory");
    }
}

// clang-format off
#define ACC4(j) "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
#define ACC16(j) ACC4(j), ACC4(j + 1), ACC4(j + 2), ACC4(j + 3)

/// acc += a b, or a b where ``add`` is 0. A warp holds 16 rows: acc[j][i] is row lane / 4 + 8 (i / 2), column
/// 8 j + 2 (lane % 4) + i % 2.
template <bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void wgmma(float (&acc)[32][4], u64 a, u64 b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %130, 0; "
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." OPERAND "." OPERAND " {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, p, 1, 1, %131, %132; }"
        : ACC16(0), ACC16(4), ACC16(8), ACC16(12), ACC16(16), ACC16(20), ACC16(24), ACC16(28)
        : "l"(a), "l"(b), "r"(add), "n"(int(A_ACROSS)), "n"(int(B_ACROSS)));
}
// clang-format on
#undef ACC4
#undef ACC16
