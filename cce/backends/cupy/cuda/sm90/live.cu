// All of a filtered backward in one launch: chunk by chunk dx of the live tiles, then their products with c and e.
//
// Blocks take items, and then tiles of the products, in turn; between the two, and before the next chunk reuses the
// slots, all wait for all. phases: 1 dx only, 2 the products only (no waiting), 3 both.
#include "live.cuh"

/// What loads: one thread, or, where rows of c are gathered, all of its warpgroup.
struct Loader {
    const Arguments& x;
    Pipeline pipe;
    Ring ring;
    int thread = threadIdx.x;
    int2 work = {0, 0};  // the tile at hand and how many live tiles its sum has: told with every stage
    u32 turn = 0;

    /// One stage: boxes of a and of b, each at a column and a row of its matrix.
    template <typename A, typename B>
    __device__ __forceinline__ void stage(const TensorMap& a, const TensorMap& b, A&& of_a, B&& of_b) {
        if constexpr (GATHER) barrier_wait(pipe.empty(ring.stage), ring.parity ^ 1);
        if (!GATHER || thread == 0) {
            barrier_wait(pipe.empty(ring.stage), ring.parity ^ 1);
            const u32 full = pipe.full(ring.stage);
            store_shared(pipe.message(ring.stage), work);
            barrier_expect(full, STAGE_BYTES);
            boxes<2>(pipe.a(ring.stage), a, full, of_a);
            boxes<4>(pipe.b(ring.stage), b, full, of_b);
        }
        if constexpr (GATHER) barrier_arrive(pipe.full(ring.stage));
        ring.next();
    }

    /// One stage: boxes of a, and rows of c as this thread copies them: ``copy`` takes the address of b.
    template <typename A, typename C>
    __device__ __forceinline__ void gathered_stage(const TensorMap& a, A&& of_a, C&& copy) {
        barrier_wait(pipe.empty(ring.stage), ring.parity ^ 1);
        const u32 full = pipe.full(ring.stage);
        if (thread == 0) {
            store_shared(pipe.message(ring.stage), work);
            barrier_expect(full, A_BYTES);
            boxes<2>(pipe.a(ring.stage), a, full, of_a);
        }
        copy(pipe.b(ring.stage));
        barrier_arrive_copied(full);
        ring.next();
    }

    /// A stage with nothing but its message.
    __device__ __forceinline__ void empty_stage() {
        barrier_wait(pipe.empty(ring.stage), ring.parity ^ 1);
        if (!GATHER || thread == 0) {
            store_shared(pipe.message(ring.stage), work);
            barrier_arrive(pipe.full(ring.stage));
        }
        if constexpr (GATHER) barrier_arrive(pipe.full(ring.stage));
        ring.next();
    }

    /// The number of the tile that thread 0 has drawn, for all who load.
    __device__ __forceinline__ int share(int drawn) {
        if constexpr (!GATHER) return drawn;
        const u32 word = pipe.message(STAGES) + 4 * turn;  // two in turn: nobody writes one that is still read
        turn ^= 1;
        if (thread == 0) store_shared(word, drawn);
        asm volatile("bar.sync 5, 128;" ::: "memory");
        return load_shared(word);
    }

    template <int COUNT, typename At>
    __device__ __forceinline__ void boxes(u32 to, const TensorMap& map, u32 full, At&& at) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int2 place = at(i);
            load_box(to + i * BOX, map, place.x, place.y, full);
        }
    }

    /// Where in c the row at a place of the vocabulary order begins, in pieces of 16 bytes. Behind the last place it is the
    /// last row again: what comes of it is not stored, or meets zeros of dx.
    __device__ __forceinline__ u32 piece_at(int place) const {
        return static_cast<u32>(__ldg(x.order + min(place, x.V - 1))) * x.c_pieces;
    }

    /// 16 bytes of a row of c that begins at ``start``, as piece ``piece`` of row ``row`` of a box; zeros beyond D.
    __device__ __forceinline__ void copy_piece(u32 box, int row, int piece, u32 start, const char* c_at_d, u32 bytes) const {
        const char* from;
        // Volatile: computed where it is used. All rows' addresses at once would not fit into the registers.
        asm volatile("mad.wide.u32 %0, %1, 16, %2;" : "=l"(from) : "r"(start), "l"(c_at_d));
        copy_16(box + row * 128 + ((piece ^ (row & 7)) << 4), from, bytes);
    }

    /// z = e c^T of the chunk's items.
    __device__ __forceinline__ void items(int chunk) {
        const int all = __ldg(x.plan.items + chunk);
        for (int nth = blockIdx.x; nth < all; nth += gridDim.x) {
            Item item;
            item.look(x, chunk, nth);
            item.look_at_tiles(x);
            if constexpr (GATHER)
                gathered_item(item);
            else
                boxed_item(item);
        }
    }

    __device__ __forceinline__ void boxed_item(const Item& item) {
        for (int k = 0; k < x.D; k += DEPTH) {
            stage(
                x.e_map, x.c_map, [&](int i) { return make_int2(k, item.block * BLOCK_N + 64 * i); },
                [&](int i) { return make_int2(k, item.tile[i / 2] * BLOCK_V + 64 * (i % 2)); });
        }
    }

    /// Eight threads copy a row's 128 bytes; each has its part of 16 rows.
    __device__ __forceinline__ void gathered_item(const Item& item) {
        constexpr int ROWS = TILE_V / 16;
        const int piece = thread % 8, row0 = thread / 8;
        // The thread's own, in shared memory, four at a time: registers are few.
        const u32 starts = pipe.rest() + 8 * TILE_V * 4 + thread * 16;  // behind the multipliers' columns
#pragma unroll
        for (int i = 0; i < ROWS; i += 4) {
            u32 four[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                four[j] = piece_at(item.tile[i / (ROWS / 2)] * BLOCK_V + 16 * ((i + j) % (ROWS / 2)) + row0);
            }
            store_shared(starts + i * WARPGROUP * 4, four);
        }
        for (int k = 0; k < x.D; k += DEPTH) {
            const int d = k + 8 * piece;
            const char* c_at_d = x.c_rows + 2 * d;
            const u32 bytes = d < x.D ? 16 : 0;
            gathered_stage(
                x.e_map, [&](int i) { return make_int2(k, item.block * BLOCK_N + 64 * i); },
                [&](u32 b) {
#pragma unroll
                    for (int i = 0; i < ROWS; i += 4) {
                        u32 four[4];
                        load_shared(starts + i * WARPGROUP * 4, four);
#pragma unroll
                        for (int j = 0; j < 4; ++j) copy_piece(b, 16 * (i + j) + row0, piece, four[j], c_at_d, bytes);
                    }
                });
        }
    }

    /// dE += dx c and dC = dx^T e. Tiles are drawn, the long ones first: their sums differ in length.
    __device__ __forceinline__ void products(int chunk) {
        const Products all(x, chunk);
        u32* const next = x.counters + 3 * chunk + 2;
        const bool draws = !GATHER || thread == 0;
        int drawn = draws ? atomicAdd(next, 1) : 0;
        for (;;) {
            const int nth = share(drawn);
            if (nth >= all.all) break;
            if (draws) drawn = atomicAdd(next, 1);  // asked for now: nobody waits for it then
            const Product p(x, all, nth);
            const Sum sum(x, p, chunk);
            work = make_int2(nth, sum.count);
            if (sum.count == 0) {
                empty_stage();
            } else if (!p.of_e) {
                of_c(p, sum);
            } else if constexpr (GATHER) {
                gathered_of_e(p, sum);
            } else {
                of_e(p, sum);
            }
        }
        work = make_int2(-1, 0);
        empty_stage();
    }

    __device__ __forceinline__ void of_e(const Product& p, const Sum& sum) {
        const int* tiles = x.plan.tile_list + sum.list;
        int next = __ldg(tiles);
        for (int i = 0; i < sum.count; ++i) {
            const int tile = next;
            next = __ldg(tiles + min(i + 1, sum.count - 1));  // asked for now: nobody waits for it then
            for (int k = 0; k < BLOCK_V; k += DEPTH) {
                stage(
                    x.dz_map, x.c_map, [&](int j) { return make_int2(k, (sum.slot + i) * BLOCK_N + 64 * j); },
                    [&](int j) { return make_int2(p.column + 64 * j, tile * BLOCK_V + k); });
            }
        }
    }

    /// A warp copies the 512 bytes of a row; each has every fourth row.
    __device__ __forceinline__ void gathered_of_e(const Product& p, const Sum& sum) {
        const int* tiles = x.plan.tile_list + sum.list;
        const int warp = thread / 32, lane = thread % 32, last = sum.count - 1;
        // A lane knows one of the warp's 32 entries of a tile: first those of the tile's first half.
        const int mine = lane / 16 * DEPTH + lane % 16 * 4 + warp;
        int next_tile = __ldg(tiles + min(1, last));
        u32 next = piece_at(__ldg(tiles) * BLOCK_V + mine);
        const int d = p.column + 8 * lane;
        const char* c_at_d = x.c_rows + 2 * d;
        const u32 bytes = d < x.D ? 16 : 0;
        for (int i = 0; i < sum.count; ++i) {
            const u32 starts = next;
            next = piece_at(next_tile * BLOCK_V + mine);  // asked for now: nobody waits for it then
            next_tile = __ldg(tiles + min(i + 2, last));
            for (int k = 0; k < BLOCK_V; k += DEPTH) {
                gathered_stage(
                    x.dz_map, [&](int j) { return make_int2(k, (sum.slot + i) * BLOCK_N + 64 * j); },
                    [&](u32 b) {
#pragma unroll 4
                        for (int j = 0; j < 16; ++j) {
                            const u32 start = __shfl_sync(~0u, starts, k / DEPTH * 16 + j);
                            copy_piece(b + lane / 8 * BOX, 4 * j + warp, lane % 8, start, c_at_d, bytes);
                        }
                    });
            }
        }
    }

    __device__ __forceinline__ void of_c(const Product& p, const Sum& sum) {
        const int *blocks = x.plan.block_list + sum.list, *slots = x.plan.slot_list + sum.list;
        int next_block = __ldg(blocks), next_slot = __ldg(slots);
        for (int i = 0; i < sum.count; ++i) {
            const int block = next_block, slot = next_slot, after = min(i + 1, sum.count - 1);
            next_block = __ldg(blocks + after);
            next_slot = __ldg(slots + after);
            for (int k = 0; k < BLOCK_N; k += DEPTH) {
                stage(
                    x.dz_map, x.e_map, [&](int j) { return make_int2(64 * j, slot * BLOCK_N + k); },
                    [&](int j) { return make_int2(p.column + 64 * j, block * BLOCK_N + k); });
            }
        }
    }

    /// Until all blocks have done their part.
    __device__ __forceinline__ void wait(const u32* arrived) const {
        if (thread == 0 || !GATHER) grid_wait(arrived);
        if constexpr (GATHER) asm volatile("bar.sync 5, 128;" ::: "memory");
    }

    __device__ __forceinline__ void run() {
        for (int chunk = x.first_chunk; chunk < x.last_chunk; ++chunk) {
            if (is_empty(x, chunk)) continue;
            if (x.phases & 1) items(chunk);
            if (x.phases == 3) wait(x.counters + 3 * chunk);
            if (x.phases & 2) products(chunk);
            if (x.phases == 3) wait(x.counters + 3 * chunk + 1);
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
            // Epilogue, and store. What is behind the last entry may be anything: it becomes 0.
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
                    gradient_of_block<32, PART>(z, j, place, values, counts, x.rows, nullptr, x.formula);
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
        __syncwarp();  // all have read the message
        pipe.release(ring.stage);
        ring.next();
    }

    /// de += sum, in float32, by the memory: nobody waits for what is there. One block of threads adds to an element in a
    /// chunk, and the chunks follow one another: the order of the additions is always the same.
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

extern "C" __global__ void __launch_bounds__(THREADS, 1) live_sm90(const __grid_constant__ Arguments x) {
    Pipeline().start();
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (GATHER || (threadIdx.x < 32 && elected())) Loader{x}.run();
    } else {
        more_registers<CONSUMER_REGISTERS>();
        Multiplier{x}.run();
    }
}
