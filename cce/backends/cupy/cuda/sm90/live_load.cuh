// A filtered backward's loading side: boxes of e, c and dx, or rows of c that are anywhere, as they are multiplied.
#pragma once

#include "live.cuh"

/// The loading side: one thread, or, where rows of c are gathered, its whole warpgroup.
struct Loader {
    const Arguments& x;
    Pipeline pipe;
    Ring ring;
    int thread = threadIdx.x;
    int2 work = {0, 0};  // the current tile and its number of live tiles: sent with every stage
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

    /// The number of the tile that thread 0 has drawn, for all loading threads.
    __device__ __forceinline__ int share(int drawn) {
        if constexpr (!GATHER) return drawn;
        const u32 word = pipe.message(STAGES) + 4 * turn;  // two in turn: none is overwritten while still read
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

    /// Where in c the row at a place of the vocabulary order begins, in pieces of 16 bytes. Behind the last place it is
    /// the last row again: what comes of it is not stored, or meets zeros of dx.
    __device__ __forceinline__ u32 piece_at(int place) const {
        return static_cast<u32>(__ldg(x.order + min(place, x.V - 1))) * x.c_pieces;
    }

    /// 16 bytes of a row of c that begins at ``start``, as piece ``piece`` of row ``row`` of a box; zeros beyond D.
    __device__ __forceinline__ void copy_piece(
        u32 box, int row, int piece, u32 start, const char* c_at_d, u32 bytes) const {
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
            if (draws) drawn = atomicAdd(next, 1);  // requested early, so that nothing waits for it
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
            next = __ldg(tiles + min(i + 1, sum.count - 1));  // requested early, so that nothing waits for it
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
            next = piece_at(next_tile * BLOCK_V + mine);  // requested early, so that nothing waits for it
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
