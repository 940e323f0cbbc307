// Block-sparse products of the live tiles: dE += dx c and dC = dx^T e (docs/algorithm.md, step 4).
//
// The order in which a sum runs is that of the work list, so the bits are the same every run. No atomics touch a result;
// a block of threads takes its next output tile from a counter, since the sums of its tiles differ in length.
#include "multiply.cuh"

#ifndef SORTED
#define SORTED 0
#endif
#ifndef BLOCKS_AT_ONCE
#define BLOCKS_AT_ONCE 2
#endif
#ifndef DC_TYPE
#define DC_TYPE BFLOAT16
#endif

struct ProductsArguments {
    const char* dz;  // (slots + 1, BLOCK_N, BLOCK_V) of the products' dtype
    Matrix e, c;
    const long long* order;  // (V,) entries, or null
    const int* row_of;  // (N,) by place in the work list: the row, -1 for one that wants no gradient
    const int *tile_list, *block_slot, *block_tiles, *block_first;
    float* de;  // (N, D), rows in the work list's order, or null
    const int *live_count, *block_list, *slot_list, *chunk_start;
    int* counters;  // (chunks, 2): the next tile of either product
    const float *mass_e, *mass, *norm;  // (T, D), (T,), (1,), or null
    char* dc;  // (V, dc_columns), or null
    const float* column_sums;  // (slots, BLOCK_V)
    float* dbias;  // (V,)
    int N, V, D, T, blocks, dc_columns, chunk;
};

constexpr int TILE_D = 128;
// dE: [BLOCK_N, TILE_D], K along the vocabulary. dC: [BLOCK_M, TILE_D], K along the rows.
constexpr int BLOCK_M = least(BLOCK_V, 128), PARTS = BLOCK_V / BLOCK_M;
constexpr int E_KSTEP = least(MOST_KSTEP, BLOCK_V), C_KSTEP = least(MOST_KSTEP, BLOCK_N);
constexpr int E_A_BYTES = along_bytes(BLOCK_N), C_A_BYTES = across_bytes(BLOCK_M, C_KSTEP);
constexpr int B_BYTES = across_bytes(TILE_D, most(E_KSTEP, C_KSTEP));
constexpr int STAGE_BYTES = most(E_A_BYTES, C_A_BYTES) + B_BYTES;
extern __shared__ __align__(128) char shared[];

// The warp's part of an output tile of ROWS rows.
template <int ROWS>
struct Part {
    static constexpr int ACROSS = WARPS / (ROWS / 16), COLUMNS = TILE_D / ACROSS, J = COLUMNS / 8;
    static __device__ __forceinline__ int row() { return threadIdx.x / 32 / ACROSS * 16; }
    static __device__ __forceinline__ int column() { return threadIdx.x / 32 % ACROSS * COLUMNS; }
};

// The next output tile, the same for all threads.
__device__ __forceinline__ int take(int* counter) {
    __shared__ int item;
    __syncthreads();
    if (threadIdx.x == 0) item = atomicAdd(counter, 1);
    __syncthreads();
    return item;
}

// A tile of de: += sum over the chunk's live tiles of row block b of dx c.
__device__ __forceinline__ void add_to_de(const ProductsArguments& p, int b, int d0) {
    using Mine = Part<BLOCK_N>;
    using Rows = Across<E_KSTEP, TILE_D>;
    constexpr int STEPS = BLOCK_V / E_KSTEP;
    const int here = p.chunk * p.blocks + b, count = p.block_tiles[here];
    if (count == 0) return;
    const int* tiles = p.tile_list + static_cast<long long>(b) * p.T + p.block_first[here];
    const char* slots = p.dz + static_cast<long long>(p.block_slot[here]) * (BLOCK_N * BLOCK_V * SIZE);

    // The sum so far comes first, not last: adding it at the end would spill registers.
    float acc[Mine::J][4];
    const int first_row = b * BLOCK_N + Mine::row(), first_column = d0 + Mine::column() + lane_column(0);
    const auto each = [&](auto visit) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const int row = first_row + lane_row(x);
            if (row >= p.N) continue;
            float* de = p.de + static_cast<long long>(row) * p.D;
#pragma unroll
            for (int j = 0; j < Mine::J; ++j) {
#pragma unroll
                for (int y = 0; y < 2; ++y) {
                    if (first_column + 8 * j + y < p.D) visit(acc[j][2 * x + y], de[first_column + 8 * j + y]);
                }
            }
        }
    };
    fill(acc, 0.0f);
    each([](float& value, float& sum) { value = sum; });

    // Read the rows of c for the next step ahead, so that nothing waits for them.
    int entries[Rows::EACH], tile = tiles[0];
    const auto look = [&](int step) {
#pragma unroll
        for (int i = 0; i < Rows::EACH; ++i) {
            const int place = tile * BLOCK_V + step % STEPS * E_KSTEP + Rows::row(i);
            entries[i] = place >= p.V ? -1 : p.order == nullptr ? place : static_cast<int>(p.order[place]);
        }
        tile = tiles[min((step + 1) / STEPS, count - 1)];
    };
    look(0);
    const unsigned base = shared_address(shared);
    pipeline(
        count * STEPS,
        [&](int step, int stage) {
            const unsigned to = base + stage * STAGE_BYTES;
            const char* dx = slots + static_cast<long long>(step / STEPS) * (BLOCK_N * BLOCK_V * SIZE);
            copy_along<BLOCK_N, E_KSTEP>(to, dx + step % STEPS * (E_KSTEP * SIZE), BLOCK_V * SIZE);
            Rows::copy(
                to + E_A_BYTES, [&](int i) { return entries[i] < 0 ? nullptr : p.c.data + entries[i] * p.c.pitch; },
                d0 * SIZE, p.c.bytes);
            look(step + 1);
        },
        [&](int stage) {
            const unsigned a = base + stage * STAGE_BYTES;
            multiply<true, false, E_KSTEP>(acc, a, a + E_A_BYTES, Mine::row(), Mine::column());
        });
    each([](float& value, float& sum) { sum = value; });
}

// Two neighbouring numbers of a row of dc, in its dtype.
__device__ __forceinline__ void store_dc(char* row, int column, float value) {
#if DC_TYPE == FLOAT32
    reinterpret_cast<float*>(row)[column] = value;
#elif DC_TYPE == FLOAT16
    half_word x;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x) : "f"(value));
    reinterpret_cast<half_word*>(row)[column] = x;
#else
    half_word x;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x) : "f"(value));
    reinterpret_cast<half_word*>(row)[column] = x;
#endif
}

// A tile of dc: entries of vocabulary block t from place ``part`` in it; the sum over live row blocks of dx^T e, and what
// stands for the dead ones.
__device__ __forceinline__ void write_dc(const ProductsArguments& p, int t, int part, int d0) {
    using Mine = Part<BLOCK_M>;
    using Dx = Across<C_KSTEP, BLOCK_M>;
    using Rows = Across<C_KSTEP, TILE_D>;
    constexpr int STEPS = BLOCK_N / C_KSTEP;
    const int count = p.live_count[t];
    const int* blocks = p.block_list + static_cast<long long>(t) * p.blocks;
    const int* slots = p.slot_list + static_cast<long long>(t) * p.blocks;

    float acc[Mine::J][4];
    fill(acc, 0.0f);
    int rows[Rows::EACH], block = 0, slot = 0, next_slot = 0;
    const auto look = [&](int step) {
        slot = next_slot;
#pragma unroll
        for (int i = 0; i < Rows::EACH; ++i) {
            const int sorted_row = block * BLOCK_N + step % STEPS * C_KSTEP + Rows::row(i);
            rows[i] = sorted_row >= p.N ? -1 : SORTED ? sorted_row : p.row_of[sorted_row];
        }
        const int next = min((step + 1) / STEPS, count - 1);
        block = blocks[next];
        next_slot = slots[next];
    };
    if (count > 0) {
        block = blocks[0];
        next_slot = slots[0];
        look(0);
    }
    const unsigned base = shared_address(shared);
    pipeline(
        count * STEPS,
        [&](int step, int stage) {
            const unsigned to = base + stage * STAGE_BYTES;
            const char* dx = p.dz + (static_cast<long long>(slot) * BLOCK_N + step % STEPS * C_KSTEP) * (BLOCK_V * SIZE);
            Dx::copy(to, [&](int i) { return dx + Dx::row(i) * (BLOCK_V * SIZE); }, part * SIZE, BLOCK_V * SIZE);
            Rows::copy(
                to + C_A_BYTES, [&](int i) { return rows[i] < 0 ? nullptr : p.e.data + rows[i] * p.e.pitch; }, d0 * SIZE,
                p.e.bytes);
            look(step + 1);
        },
        [&](int stage) {
            const unsigned a = base + stage * STAGE_BYTES;
            multiply<false, false, C_KSTEP>(acc, a, a + C_A_BYTES, Mine::row(), Mine::column());
        });

    // Store: written once, in its final dtype.
    const float norm = p.norm == nullptr ? 1.0f : *p.norm;
    const float columns = min(BLOCK_V, p.V - t * BLOCK_V);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        const int place = t * BLOCK_V + part + Mine::row() + lane_row(x);
        if (place >= p.V) continue;
        const long long entry = p.order == nullptr ? place : p.order[place];
        char* row = p.dc + entry * p.dc_columns * (DC_TYPE == FLOAT32 ? 4 : 2);
#pragma unroll
        for (int j = 0; j < Mine::J; ++j) {
#pragma unroll
            for (int y = 0; y < 2; ++y) {
                const int d = d0 + Mine::column() + 8 * j + lane_column(y);
                if (d >= p.dc_columns) continue;
                const float dead = p.mass_e == nullptr ? 0.0f : p.mass_e[static_cast<long long>(t) * p.D + d] / columns;
                store_dc(row, d, (acc[j][2 * x + y] + dead) * norm);
            }
        }
    }
}

// Both products of a chunk: tiles of dE, then of dC, which keep blocks busy once no tile of dE is left.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE) products_kernel(const __grid_constant__ ProductsArguments p) {
    const int t0 = p.chunk_start[p.chunk], tiles = p.chunk_start[p.chunk + 1] - t0;
    if (tiles == 0) return;
    int* counters = p.counters + 2 * p.chunk;
    if (p.de != nullptr) {
        // Longest sums first: the work list puts the rows with most hits last.
        const int tiles_d = cdiv(p.D, TILE_D);
        for (int item = take(counters); item < p.blocks * tiles_d; item = take(counters)) {
            add_to_de(p, p.blocks - 1 - item / tiles_d, item % tiles_d * TILE_D);
        }
    }
    if (p.dc != nullptr) {
        const int tiles_d = cdiv(p.dc_columns, TILE_D);
        for (int item = take(counters + 1); item < tiles * PARTS * tiles_d; item = take(counters + 1)) {
            const int unit = item / tiles_d;
            write_dc(p, t0 + unit / PARTS, unit % PARTS * BLOCK_M, item % tiles_d * TILE_D);
        }
    }
}

// dbias of the chunk's entries: column sums of live tiles, in the order of row blocks, and dead rows' mass.
extern "C" __global__ void __launch_bounds__(THREADS) dbias_kernel(const __grid_constant__ ProductsArguments p) {
    const int begin = p.chunk_start[p.chunk] * BLOCK_V, end = min(p.chunk_start[p.chunk + 1] * BLOCK_V, p.V);
    const float norm = p.norm == nullptr ? 1.0f : *p.norm;
    for (int place = begin + blockIdx.x * THREADS + threadIdx.x; place < end; place += gridDim.x * THREADS) {
        const int t = place / BLOCK_V;
        const int* slots = p.slot_list + static_cast<long long>(t) * p.blocks;
        float total = 0;
        for (int nth = 0; nth < p.live_count[t]; ++nth) {
            total += p.column_sums[static_cast<long long>(slots[nth]) * BLOCK_V + place % BLOCK_V];
        }
        if (p.mass != nullptr) total += p.mass[t] / min(BLOCK_V, p.V - t * BLOCK_V);
        p.dbias[p.order == nullptr ? place : p.order[place]] = total * norm;
    }
}
