// All of a filtered backward in one launch: chunk by chunk dx of the live tiles, then their products with c and e.
//
// Blocks take items, and then tiles of the products, in turn; between the two, and before the next chunk reuses the
// slots, all wait for all. phases: 1 dx only, 2 the products only (no waiting), 3 both.
#include "live_load.cuh"
#include "live_multiply.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) live_kernel(const __grid_constant__ Arguments x) {
    Pipeline().start();
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (GATHER || (threadIdx.x < 32 && elected())) Loader{x}.run();
    } else {
        more_registers<CONSUMER_REGISTERS>();
        Multiplier{x}.run();
    }
}
