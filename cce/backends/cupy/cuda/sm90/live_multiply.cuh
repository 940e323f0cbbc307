// The multiplying side of a filtered backward: products of the loaded stages, and the epilogues of their sums.
#pragma once

#include "live.cuh"

/// The multiplying warps: 16 rows of every tile each.
struct Multiplier {
    const Arguments& x;
    Pipeline pipe;
    Ring ring;
    int half = threadIdx.x / WARPGROUP - 1;
    int warp_row = static_cast<int>(threadIdx.x - WARPGROUP) / 32 * 16;

    /// dx of the chunk's items, into their slots.
    __device__ __forceinline__ void items(float (&z)[32][4], int chunk) {
        constexpr int PART = 8;  // accumulators at a time: what belongs to all of them would not fit into registers
        const int steps = (x.D + DEPTH - 1) / DEPTH;
        const int all = __ldg(x.plan.items + chunk);
        if (blockIdx.x >= all) return;
        Item item, next;
        int rows[2];
        next.look(x, chunk, blockIdx.x);
        look_at_rows(next, rows);
        for (int nth = blockIdx.x; nth < all; nth += gridDim.x) {
            // Tile origin, and what belongs to its rows and columns; of the next one what there is to ask for.
            item = next;
            const bool counts[2] = {rows[0] >= 0, rows[1] >= 0};
            const RowValues values[2] = {row_values(x.rows, max(rows[0], 0)), row_values(x.rows, max(rows[1], 0))};
            next.look(x, chunk, min(nth + static_cast<int>(gridDim.x), all - 1));
            Columns biases;
            if constexpr (BIAS) read_bias(biases, item);
            // Logit tile, as in the forward.
            multiply<false, false>(z, pipe, ring, half, steps);
            look_at_rows(next, rows);  // here at the end of the epilogue
            float* const bias = warp_columns(0);
            if constexpr (BIAS) biases.put(bias);
            cap(z, bias, x.formula);
            // Epilogue, and store. Columns after the last entry may hold anything: they become 0.
            const int last = item.tile[1] * BLOCK_V;
            const int columns = last + BLOCK_V > x.V ? x.V - last : BLOCK_V;
            element* to[2];
            to[0] = x.dz + static_cast<i64>(item.slot) * SLOT + (warp_row + lane_row(0)) * BLOCK_V;
            to[1] = to[0] + 8 * BLOCK_V;
#pragma unroll
            for (int nth = 0; nth < 2; ++nth) {
                if (nth == item.count) break;
#pragma unroll
                for (int j = 16 * nth; j < 16 * (nth + 1); j += PART) {
                    const int place = item.tile[nth] * BLOCK_V + 8 * (j % 16);
                    dx_of_block<32, PART>(z, j, place, values, counts, x.rows, nullptr, x.formula);
                    if (columns == BLOCK_V || nth + 1 < item.count) store_rows<PART, true>(z, j, to, 0, {true, true});
                }
                if (columns < BLOCK_V && nth + 1 == item.count) {
                    mask(z, columns + BLOCK_V * nth, 0.0f);
                    store_rows<16, true>(z, 16 * nth, to, 0, {true, true});
                }
                to[0] += SLOT - BLOCK_V;  // the second tile's accumulators begin at column BLOCK_V
                to[1] += SLOT - BLOCK_V;
            }
        }
    }

    /// The tiles of an item, and the problem's rows that the lane has of it; -1 where there is none.
    __device__ __forceinline__ void look_at_rows(Item& item, int (&rows)[2]) const {
        item.look_at_tiles(x);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int sorted = item.block * BLOCK_N + warp_row + lane_row(i);
            rows[i] = sorted < x.N ? __ldg(x.row_of + sorted) : -1;
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

    /// Both products of the chunk: the tiles that the loading side has drawn.
    __device__ __forceinline__ void products(float (&sum)[32][4], int chunk) {
        const Products all(x, chunk);
        for (int2 work; (work = pipe.read_message(ring)).x >= 0;) {
            const Product p(x, all, work.x);
            if (work.y == 0) {
                skip_stage();
                if (!p.of_e) write_dead(p);
            } else if (p.of_e) {
                multiply<false, true>(sum, pipe, ring, half, 2 * work.y);
                add_to_de(sum, p);
            } else {
                Columns mass;
                if (x.mass_e) mass.read(x.mass_e + static_cast<i64>(p.index) * x.D, p.column, x.D);
                multiply<true, true>(sum, pipe, ring, half, 2 * work.y);
                write_dc(sum, p, mass);
            }
        }
        skip_stage();
    }

    __device__ __forceinline__ void skip_stage() {
        pipe.release(ring.stage);
        ring.next();
    }

    /// de += sum, in float32, added in memory, so that nothing waits for a read. One thread block adds to an element in
    /// a chunk, and the chunks follow one another: the order of the additions is always the same.
    __device__ __forceinline__ void add_to_de(const float (&sum)[32][4], const Product& p) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = p.index * BLOCK_N + warp_row + lane_row(i);
            if (row >= x.N) continue;
            float* const de = x.de + static_cast<i64>(row) * x.D + p.column + lane_column(0);
            const int room = x.D - p.column - lane_column(0);
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                if (8 * j < room) add_two(de + 8 * j, sum[j][2 * i], sum[j][2 * i + 1]);
            }
        }
    }

    /// Rows of dC, written once: the sum, what stands for the dead tiles, times norm.
    __device__ __forceinline__ void write_dc(float (&sum)[32][4], const Product& p, const Columns& mass) const {
        const int place = p.index * BLOCK_V + warp_row + lane_row(0);
        if (x.mass_e) {
            const float share = 1.0f / min(BLOCK_V, x.V - p.index * BLOCK_V);
            float* const numbers = warp_columns(0);
            mass.put(numbers);
#pragma unroll
            for (int j = 0; j < 32; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[j][i] += numbers[8 * j + lane_column(i % 2)] * share;
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
        const int room = x.width - p.column;
        if (room >= TILE_V)
            store_rows<32, true>(sum, 0, to, room, inside);
        else
            store_rows<32, false>(sum, 0, to, room, inside);
    }

    /// Rows of dC of a block without live tiles, all the same: what stands for the dead ones, times norm.
    __device__ __forceinline__ void write_dead(const Product& p) const {
        const int d = p.column + 8 * lane_of_warp();
        u32 word[4] = {};
        if (x.mass_e && d < x.D) {
            const float factor = (x.norm ? __ldg(x.norm) : 1.0f) / min(BLOCK_V, x.V - p.index * BLOCK_V);
            const float2* mass = reinterpret_cast<const float2*>(x.mass_e + static_cast<i64>(p.index) * x.D + d);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 m = __ldg(mass + i);
                word[i] = pack(m.x * factor, m.y * factor);
            }
        }
        const int place0 = p.index * BLOCK_V + warp_row, last = min(place0 + 16, x.V);
#pragma unroll 1
        for (int place = place0; place < last; ++place) {
            const i64 entry = x.order ? __ldg(x.order + place) : place;
            store_some(x.dc + entry * x.width + d, word, x.width - d);
        }
    }

    __device__ __forceinline__ void run() {
        float acc[32][4];
        for (int chunk = x.first_chunk; chunk < x.last_chunk; ++chunk) {
            if (is_empty(x, chunk)) continue;
            if (x.phases & 1) items(acc, chunk);
            if (x.phases == 3) grid_arrive(x.counters + 3 * chunk);
            if (x.phases & 2) products(acc, chunk);
            if (x.phases == 3) grid_arrive(x.counters + 3 * chunk + 1);
        }
    }
};
