// The plan of a filtered backward: chunks of vocabulary blocks, their live tiles, and slots of the scratch memory for
// them (cce/backends/gpu/plan.py says what the tables hold).
//
// All of it follows from before [T + 1, B], how many live tiles a row block has before each vocabulary block: what a chunk
// has of a row block is the difference of two rows of it, and a tile's number within is what precedes it there. So
// nothing is counted but once along the vocabulary and, by each warp for itself, across the row blocks.

struct PlanArguments {
    const unsigned char* live;  // (T, B)
    int *before, *chunk_of;     // (T + 1, B), (T,)
    int *tile_list, *live_count, *block_list, *slot_list, *chunk_start, *block_slot, *block_tiles, *block_first;
    int *item_block, *item_first, *item_slot, *item_tiles, *items;
    int T, B, chunks, slots, step, pack;
};

__device__ __forceinline__ int sum_of_warp(int x) {
    for (int n = 16; n > 0; n /= 2) x += __shfl_xor_sync(~0u, x, n);
    return x;
}

// Sum over the lanes before this one.
__device__ __forceinline__ int sum_before(int x) {
    const int lane = threadIdx.x % 32;
    int sum = x;
    for (int n = 1; n < 32; n *= 2) {
        const int other = __shfl_up_sync(~0u, sum, n);
        if (lane >= n) sum += other;
    }
    return sum - x;
}

__device__ __forceinline__ int cdiv(int a, int b) { return (a + b - 1) / b; }

// before, and a row block's list of live tiles; a thread block has a row block.
extern "C" __global__ void __launch_bounds__(1024) tile_list_kernel(const __grid_constant__ PlanArguments p) {
    __shared__ int of_warp[32];
    const int b = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int* const list = p.tile_list + static_cast<long long>(b) * p.T;
    int total = 0;
    for (int start = 0; start < p.T; start += 1024) {
        const int t = start + threadIdx.x;
        const bool on = t < p.T && p.live[static_cast<long long>(t) * p.B + b];
        const unsigned of_mine = __ballot_sync(~0u, on);
        if (lane == 0) of_warp[warp] = __popc(of_mine);
        __syncthreads();
        const int count = of_warp[lane];
        const int place = total + sum_of_warp(lane < warp ? count : 0) + __popc(of_mine & ((1u << lane) - 1));
        total += sum_of_warp(count);
        if (t < p.T) p.before[static_cast<long long>(t) * p.B + b] = place;
        if (on) list[place] = t;
        __syncthreads();
    }
    if (threadIdx.x == 0) p.before[static_cast<long long>(p.T) * p.B + b] = total;
}

// Chunk k begins with the first vocabulary block that k step live tiles precede. A warp has a vocabulary block.
extern "C" __global__ void __launch_bounds__(256) chunks_kernel(const __grid_constant__ PlanArguments p) {
    const int t = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (t >= p.T) return;
    const int* const here = p.before + static_cast<long long>(t) * p.B;
    int earlier = 0, next = 0;
    for (int b = lane; b < p.B; b += 32) {
        earlier += here[b];
        next += here[p.B + b];
    }
    earlier = sum_of_warp(earlier);
    next = sum_of_warp(next);
    const int last = t + 1 < p.T ? next / p.step : p.chunks;  // behind the last block all that are left begin
    for (int k = earlier / p.step + 1 + lane; k <= last; k += 32) p.chunk_start[k] = t + 1;
    if (lane > 0) return;
    if (t == 0) p.chunk_start[0] = 0;
    p.live_count[t] = next - earlier;
    p.chunk_of[t] = earlier / p.step;
}

// State of 32 row blocks, one per lane, at vocabulary block t of a chunk of blocks t0 to t1.
struct Share {
    int first, all, here, on, rank;

    __device__ __forceinline__ Share(const PlanArguments& p, int b, int t, int t0, int t1) {
        const auto at = [&](int row) { return p.before[static_cast<long long>(row) * p.B + b]; };
        const bool is = b < p.B;
        first = is ? at(t0) : 0;
        all = is ? at(t1) - first : 0;
        here = is ? at(t) : 0;
        on = is && t < p.T ? at(t + 1) - here : 0;
        rank = here - first;
    }
};

// A vocabulary block's live row blocks, their slots, and the items that begin there.
__device__ __forceinline__ void block_of(const PlanArguments& p, int t) {
    const int lane = threadIdx.x % 32, k = p.chunk_of[t], t0 = p.chunk_start[k], t1 = p.chunk_start[k + 1];
    // An item begins with every pack-th tile of a row block: how many have begun, before this vocabulary block.
    int begun = 0;
    for (int b = lane; b < p.B; b += 32) begun += cdiv(Share(p, b, t, t0, t1).rank, p.pack);
    begun = sum_of_warp(begun);
    int slots = 0, listed = 0;
    for (int b0 = 0; b0 < p.B; b0 += 32) {
        const int b = b0 + lane;
        const Share x(p, b, t, t0, t1);
        const bool begins = x.on && x.rank % p.pack == 0;
        const unsigned earlier = (1u << lane) - 1;
        const unsigned on = __ballot_sync(~0u, x.on), beginning = __ballot_sync(~0u, begins);
        const int slot = slots + sum_before(x.all) + x.rank;
        if (x.on) {
            const long long where = static_cast<long long>(t) * p.B + listed + __popc(on & earlier);
            p.block_list[where] = b;
            p.slot_list[where] = slot;
        }
        if (begins) {
            const long long where = static_cast<long long>(k) * p.slots + begun + __popc(beginning & earlier);
            p.item_block[where] = b;
            p.item_first[where] = x.here;
            p.item_slot[where] = slot;
            p.item_tiles[where] = min(p.pack, x.all - x.rank);
        }
        slots += sum_of_warp(x.all);
        listed += __popc(on);
        begun += __popc(beginning);
    }
}

// A chunk's share of every row block, and how many items it has.
__device__ __forceinline__ void chunk(const PlanArguments& p, int k) {
    const int lane = threadIdx.x % 32, t0 = p.chunk_start[k], t1 = p.chunk_start[k + 1];
    int slots = 0, items = 0;
    for (int b0 = 0; b0 < p.B; b0 += 32) {
        const int b = b0 + lane;
        const Share x(p, b, t0, t0, t1);
        const int slot = slots + sum_before(x.all);
        if (b < p.B) {
            const long long where = static_cast<long long>(k) * p.B + b;
            p.block_slot[where] = slot;
            p.block_tiles[where] = x.all;
            p.block_first[where] = x.first;
        }
        slots += sum_of_warp(x.all);
        items += sum_of_warp(cdiv(x.all, p.pack));
    }
    if (lane == 0) p.items[k] = items;
}

// A warp has a vocabulary block, or, behind them, a chunk.
extern "C" __global__ void __launch_bounds__(256) items_kernel(const __grid_constant__ PlanArguments p) {
    const int nth = blockIdx.x * 8 + threadIdx.x / 32;
    if (nth < p.T) {
        block_of(p, nth);
    } else if (nth < p.T + p.chunks) {
        chunk(p, nth - p.T);
    }
}
