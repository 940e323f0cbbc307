// All of a filtered backward in one launch: chunk by chunk dx of the live tiles, then their products with c and e.
//
// Blocks take items, and then tiles of the products, in turn; between the two, and before the next chunk reuses the
// slots, all wait for all. phases: 1 dx only, 2 the products only (no waiting), 3 both.
#include "live.cuh"

struct Maps {
    TensorMap e, c, dz;  // boxes of 64 x 64
};

/// The loading thread.
struct Loader {
    const Maps& maps;
    const Arguments& x;
    Pipeline pipe;
    Ring ring;

    /// One stage: a of two boxes, b of four; each box is at a column and a row of its matrix.
    template <typename A, typename B>
    __device__ __forceinline__ void stage(const TensorMap& a, A&& of_a, const TensorMap& b, B&& of_b) {
        const u32 full = pipe.claim(ring);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int2 at = of_a(i);
            load_box(pipe.a(ring.stage) + i * BOX, a, at.x, at.y, full);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int2 at = of_b(i);
            load_box(pipe.b(ring.stage) + i * BOX, b, at.x, at.y, full);
        }
        ring.next();
    }

    /// z = e c^T of the chunk's items.
    __device__ __forceinline__ void items(int chunk) {
        const int all = __ldg(x.plan.items + chunk);
        for (int nth = blockIdx.x; nth < all; nth += gridDim.x) {
            const Item item(x, chunk, nth);
            for (int k = 0; k < x.D; k += DEPTH) {
                stage(
                    maps.e, [&](int i) { return make_int2(k, item.block * BLOCK_N + 64 * i); }, maps.c,
                    [&](int i) { return make_int2(k, item.tile[i / 2] * BLOCK_V + 64 * (i % 2)); });
            }
        }
    }

    /// dE += dx c and dC = dx^T e.
    __device__ __forceinline__ void products(int chunk) {
        const Products all(x, chunk);
        for (int nth = blockIdx.x; nth < all.all; nth += gridDim.x) {
            const Product p(x, all, chunk, nth);
            const int* others = (p.of_e ? x.plan.tile_list : x.plan.block_list) + p.list;
            const int* slots = x.plan.slot_list + p.list;
            int next = p.count ? __ldg(others) : 0, next_slot = p.count && !p.of_e ? __ldg(slots) : p.slot;
            for (int i = 0; i < p.count; ++i) {
                const int other = next, slot = next_slot;
                if (i + 1 < p.count) {  // asked for now: nobody waits for it then
                    next = __ldg(others + i + 1);
                    next_slot = p.of_e ? slot + 1 : __ldg(slots + i + 1);
                }
                for (int k = 0; k < 128; k += DEPTH) {
                    const auto across = [&](int j) { return make_int2(p.column + 64 * j, other * 128 + k); };
                    if (p.of_e)
                        stage(maps.dz, [&](int j) { return make_int2(k, slot * BLOCK_N + 64 * j); }, maps.c, across);
                    else
                        stage(maps.dz, [&](int j) { return make_int2(64 * j, slot * BLOCK_N + k); }, maps.e, across);
                }
            }
        }
    }
};

/// The multiplying warps: 16 rows of every tile each.
struct Multiplier {
    const Arguments& x;
    Pipeline pipe;
    Ring ring;
    int half = threadIdx.x / WARPGROUP - 1;
    int warp_row = static_cast<int>(threadIdx.x - WARPGROUP) / 32 * 16;

    /// dx of the chunk's items, into their slots.
    __device__ __forceinline__ void items(float (&z)[32][4], int chunk) {
        constexpr int PART = SOFTCAP ? 4 : 8;  // accumulators at a time: no more spill no registers
        const int steps = (x.D + DEPTH - 1) / DEPTH;
        const int all = __ldg(x.plan.items + chunk);
        float* bias = warp_columns(pipe, 0);
        for (int nth = blockIdx.x; nth < all; nth += gridDim.x) {
            // Tile origin, and what belongs to its rows and columns.
            const Item item(x, chunk, nth);
            bool counts[2];
            RowValues values[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int sorted = item.block * BLOCK_N + warp_row + lane_row(i);
                const i64 row = __ldg(x.row_order + min(sorted, x.N - 1));
                counts[i] = sorted < x.N && x.keep[row];
                values[i] = row_values(x.rows, static_cast<int>(row));
            }
            Columns biases;
            if constexpr (BIAS) read_bias(biases, item);
            // Logit tile, as in the forward.
            multiply<false, false>(z, pipe, ring, half, steps);
            if constexpr (BIAS) biases.put(bias);
            cap(z, bias, x.formula);
            // Epilogue. What is behind the last entry may be anything: it becomes 0.
#pragma unroll
            for (int j = 0; j < 32; j += PART) {
                const int place = item.tile[j / 16] * BLOCK_V + 8 * (j % 16);
                gradient_of_block<32, PART>(z, j, place, values, counts, x.rows, nullptr, x.formula);
            }
            const int last = item.tile[1] * BLOCK_V;
            if (last + BLOCK_V > x.V) mask(z, x.V - last + (item.count > 1 ? BLOCK_V : 0), 0.0f);
            // Store.
            element* to = x.dz + static_cast<i64>(item.slot) * SLOT + (warp_row + lane_row(0)) * BLOCK_V;
            store_rows<16>(z, 0, {to, to + 8 * BLOCK_V}, BLOCK_V, {true, true});
            if (item.count > 1) {
                to += SLOT;
                store_rows<16>(z, 16, {to, to + 8 * BLOCK_V}, BLOCK_V, {true, true});
            }
        }
    }

    __device__ __forceinline__ void read_bias(Columns& biases, const Item& item) const {
#pragma unroll
        for (int i = 0; i < TILE_V / 32; ++i) {
            const int place = item.tile[i / 4] * BLOCK_V + 32 * (i % 4) + lane_of_warp();
            const i64 entry = place >= x.V ? 0 : x.order ? __ldg(x.order + place) : place;
            biases.values[i] = __ldg(x.bias + entry);
        }
    }

    /// Both products of the chunk.
    __device__ __forceinline__ void products(float (&sum)[32][4], int chunk) {
        const Products all(x, chunk);
        for (int nth = blockIdx.x; nth < all.all; nth += gridDim.x) {
            const Product p(x, all, chunk, nth);
            if (p.of_e) {
                multiply<false, true>(sum, pipe, ring, half, 2 * p.count);
                if (p.count) add_to_de(sum, p);
            } else {
                multiply<true, true>(sum, pipe, ring, half, 2 * p.count);
                write_dc(sum, p);
            }
        }
    }

    /// de += sum, in float32: the same thread has the same numbers in every chunk.
    __device__ __forceinline__ void add_to_de(const float (&sum)[32][4], const Product& p) const {
        constexpr int PART = 8;  // accumulators whose numbers are on the way at the same time
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = p.index * BLOCK_N + warp_row + lane_row(i);
            if (row >= x.N) continue;
            float* const de = x.de + static_cast<i64>(row) * x.D + p.column + lane_column(0);
            const int room = x.D - p.column - lane_column(0);
#pragma unroll
            for (int j0 = 0; j0 < 32; j0 += PART) {
                float2 old[PART];
#pragma unroll
                for (int j = 0; j < PART; ++j) {
                    if (8 * (j0 + j) < room) old[j] = *reinterpret_cast<const float2*>(de + 8 * (j0 + j));
                }
#pragma unroll
                for (int j = 0; j < PART; ++j) {
                    const float2 now = {old[j].x + sum[j0 + j][2 * i], old[j].y + sum[j0 + j][2 * i + 1]};
                    if (8 * (j0 + j) < room) *reinterpret_cast<float2*>(de + 8 * (j0 + j)) = now;
                }
            }
        }
    }

    /// Rows of dC, written once: the sum, what stands for the dead tiles, times norm.
    __device__ __forceinline__ void write_dc(float (&sum)[32][4], const Product& p) const {
        if (p.count == 0) {
#pragma unroll
            for (int j = 0; j < 32; ++j) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0;
        }
        const int place = p.index * BLOCK_V + warp_row + lane_row(0);
        if (x.mass_e) {
            const float share = 1.0f / min(BLOCK_V, x.V - p.index * BLOCK_V);
            const float* mass = x.mass_e + static_cast<i64>(p.index) * x.D + p.column + lane_column(0);
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                if (p.column + 8 * j + lane_column(0) >= x.D) continue;
                const float2 m = __ldg(reinterpret_cast<const float2*>(mass + 8 * j));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    sum[j][2 * i] += m.x * share;
                    sum[j][2 * i + 1] += m.y * share;
                }
            }
        }
        if (x.norm) {
            const float norm = __ldg(x.norm);
#pragma unroll
            for (int j = 0; j < 32; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[j][i] *= norm;
            }
        }
        element* to[2];
        bool inside[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            inside[i] = place + 8 * i < x.V;
            const i64 entry = inside[i] && x.order ? __ldg(x.order + place + 8 * i) : place + 8 * i;
            to[i] = x.dc + entry * x.width + p.column;
        }
        store_rows<32>(sum, 0, to, x.width - p.column, inside);
    }
};

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(THREADS, 1)
live_sm90(const __grid_constant__ Maps maps, const __grid_constant__ Arguments x) {
    Pipeline().start();
    u32 expected = 0;  // blocks that have come to the grid's barrier
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32 && elected()) {
            Loader loader{maps, x};
            for (int chunk = x.first_chunk; chunk < x.last_chunk; ++chunk) {
                if (is_empty(x, chunk)) continue;
                if (x.phases & 1) loader.items(chunk);
                if (x.phases == 3) grid_wait(x.arrived, expected += gridDim.x);
                if (x.phases & 2) loader.products(chunk);
                if (x.phases == 3) grid_wait(x.arrived, expected += gridDim.x);
            }
        }
    } else {
        more_registers<CONSUMER_REGISTERS>();
        float acc[32][4];
        Multiplier multiplier{x};
        for (int chunk = x.first_chunk; chunk < x.last_chunk; ++chunk) {
            if (is_empty(x, chunk)) continue;
            if (x.phases & 1) multiplier.items(acc, chunk);
            if (x.phases == 3) grid_arrive(x.arrived);
            if (x.phases & 2) multiplier.products(acc, chunk);
            if (x.phases == 3) grid_arrive(x.arrived);
        }
    }
}
