// Operands on their way from global to shared memory, and the pipeline that hides it: cp.async, for sm_80 and up.
//
// In shared memory an operand is rows of 128 bytes, eight chunks of 16, chunk k of row r at place k ^ (r % 8): eight
// neighbouring rows of one chunk, or one row's eight chunks, lie in different banks. An operand whose rows are the
// product's rows (*along*: K runs along them) has KSTEP of K a row; one whose rows are of K (*across*) has them in panels
// of 128 bytes of columns.
#pragma once
#include "options.cuh"

#ifndef STAGES
#define STAGES 3
#endif

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int ROW_BYTES = 128;
constexpr int SIZE = sizeof(element);
constexpr int CHUNK = 16 / SIZE;               // elements
constexpr int MOST_KSTEP = ROW_BYTES / SIZE;   // of K, for a row of 128 bytes

__device__ constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }
__device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__device__ constexpr int most(int a, int b) { return a > b ? a : b; }

// Bytes of an operand with ROWS rows of the product, along or across.
__device__ constexpr int along_bytes(int rows) { return rows * ROW_BYTES; }
__device__ constexpr int across_bytes(int columns, int kstep) { return cdiv(columns * SIZE, ROW_BYTES) * kstep * ROW_BYTES; }

__device__ __forceinline__ unsigned shared_address(const void* x) {
    return static_cast<unsigned>(__cvta_generic_to_shared(x));
}

// Where a chunk of a row lies, in bytes.
__device__ __forceinline__ unsigned chunk_at(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// 16 bytes; zeros, and nothing is read, unless ``there``.
__device__ __forceinline__ void copy_chunk(unsigned to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// An aligned matrix: where it begins, bytes from row to row, bytes of a row.
struct Matrix {
    const char* data;
    long long pitch;
    int bytes;
};

// ROWS rows of a matrix, MOST_KSTEP columns of them at a time: an operand along. ``index(i)``: which row of the matrix row
// operand_row(i) of the operand is.
template <int ROWS>
struct Along {
    static constexpr int AT_ONCE = THREADS / 8, EACH = cdiv(ROWS, AT_ONCE);

    static __device__ __forceinline__ int operand_row(int i) { return threadIdx.x / 8 + i * AT_ONCE; }

    // Bytes from ``start`` on.
    template <class Index>
    static __device__ __forceinline__ void copy(unsigned to, const Matrix& x, int start, Index index) {
        const int chunk = threadIdx.x % 8, at = start + chunk * 16;
        const char* from = x.data + at;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (ROWS % AT_ONCE != 0 && operand_row(i) >= ROWS) continue;
            unsigned row = index(i);
            asm volatile("" : "+r"(row));  // else the compiler keeps all addresses in registers, and spills others
            copy_chunk(to + chunk_at(operand_row(i), chunk), from + static_cast<long long>(row) * x.pitch, at < x.bytes);
        }
    }
};

// Rows that follow one another from ``first``; those behind ``last`` are read as that one.
template <int ROWS>
struct RowRange {
    int first, last;

    __device__ __forceinline__ void copy(unsigned to, const Matrix& x, int start) const {
        Along<ROWS>::copy(to, x, start, [&](int i) { return min(first + Along<ROWS>::operand_row(i), last); });
    }
};

// Any rows: ``index(r)`` is row r of the operand.
template <int ROWS>
struct RowList {
    int rows[Along<ROWS>::EACH];

    template <class Index>
    __device__ __forceinline__ explicit RowList(Index index) {
#pragma unroll
        for (int i = 0; i < Along<ROWS>::EACH; ++i) rows[i] = index(min(Along<ROWS>::operand_row(i), ROWS - 1));
    }

    __device__ __forceinline__ void copy(unsigned to, const Matrix& x, int start) const {
        Along<ROWS>::copy(to, x, start, [&](int i) { return rows[i]; });
    }
};

// ROWS rows of KSTEP elements, ``pitch`` bytes apart: an operand along.
template <int ROWS, int KSTEP>
__device__ __forceinline__ void copy_along(unsigned to, const char* from, int pitch) {
    constexpr int CHUNKS = KSTEP * SIZE / 16;
#pragma unroll
    for (int i = 0; i < cdiv(ROWS * CHUNKS, THREADS); ++i) {
        const int row = (threadIdx.x + i * THREADS) / CHUNKS, chunk = (threadIdx.x + i * THREADS) % CHUNKS;
        if (ROWS * CHUNKS % THREADS == 0 || row < ROWS) copy_chunk(to + chunk_at(row, chunk), from + row * pitch + chunk * 16, true);
    }
}

// KSTEP rows of a matrix and COLUMNS of its columns: an operand across. Each thread copies chunks of the rows row(i).
template <int KSTEP, int COLUMNS>
struct Across {
    static constexpr int CHUNKS = COLUMNS * SIZE / 16, EACH = cdiv(KSTEP * CHUNKS, THREADS);

    static __device__ __forceinline__ int row(int i) { return (threadIdx.x + i * THREADS) / CHUNKS; }

    // ``pointer(i)``: first byte of row(i), or null for zeros; bytes from ``start`` on, of rows that have ``bytes``.
    template <class Pointer>
    static __device__ __forceinline__ void copy(unsigned to, Pointer pointer, long long start, long long bytes) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int chunk = (threadIdx.x + i * THREADS) % CHUNKS;
            if (KSTEP * CHUNKS % THREADS != 0 && row(i) >= KSTEP) continue;
            const char* from = pointer(i);
            const long long at = start + chunk * 16;
            const bool there = from != nullptr && at < bytes;
            copy_chunk(to + chunk / 8 * (KSTEP * ROW_BYTES) + chunk_at(row(i), chunk % 8), from + (there ? at : 0), there);
        }
    }
};

// multiply(stage) for every step, behind copies of later steps into the other stages: load(step, stage) starts them.
// Afterwards all threads are done with the stages.
template <class Load, class Multiply>
__device__ __forceinline__ void pipeline(int steps, Load load, Multiply multiply) {
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) load(step, step);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();  // the step's data are there, and all have multiplied what the next copies replace
        const int ahead = step + STAGES - 1;
        if (ahead < steps) load(ahead, stage == 0 ? STAGES - 1 : stage - 1);
        asm volatile("cp.async.commit_group;" ::: "memory");
        multiply(stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
}
