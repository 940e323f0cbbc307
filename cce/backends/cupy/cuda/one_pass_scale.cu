// q becomes the gradient of the logits, in place (one_pass.cuh): dz = a p - sum_k g_k [j = target_k], with
// p = q exp((m - lse) - lse_low); under a softcap times 1 - (z / softcap)^2, with z = m + log q, or lse - nll at a target.
#include "dx.cuh"

struct ScaleArguments {
    char* q;                            // (N, V), pitch; becomes dz, of the products' dtype
    const float* tile_max;              // (T, N)
    const float *lse, *lse_low, *nll;   // (N,), (N,), (N, K)
    const long long* targets;           // (N, K)
    const float *a, *g;                 // (N,) from ``stride_a`` to the next, (N, K); multiplied by the scale
    long long N, V, K, pitch, tile, stride_a;  // tile: columns of one of tile_max
    float softcap;
};

constexpr int EACH = DTYPE == FLOAT32 ? 4 : 8;  // columns of a thread: 16 bytes
constexpr int ROWS = 8;                         // of a block

__device__ __forceinline__ float from_half(unsigned word) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<half_word>(word)));
    return value;
}

// A thread has EACH columns of ROWS rows. A row without a target may hold NaN and gets zeros. At a target p is exp(-nll),
// made of the logit that the loss is made of. In a row whose lse is not finite lse_low is NaN, and so is p.
extern "C" __global__ void __launch_bounds__(256) scale_kernel(const __grid_constant__ ScaleArguments p) {
    const long long column = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * EACH;
    if (column >= p.V) return;
    const float* tile_max = p.tile_max + column / p.tile * p.N;
    const long long row0 = static_cast<long long>(blockIdx.y) * ROWS;
    uint4 words[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const long long row = row0 + r;
        if (row < p.N) words[r] = *reinterpret_cast<const uint4*>(p.q + (row * p.pitch + column) * sizeof(element));
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const long long row = row0 + r;
        if (row >= p.N) break;
        const float a = p.a[row * p.stride_a];
        const float factor = exp_of(__fsub_rn(tile_max[row], p.lse[row]), p.lse_low[row]) * a;
        const unsigned word[4] = {words[r].x, words[r].y, words[r].z, words[r].w};
        float x[EACH], z[SOFTCAP ? EACH : 1];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
#if DTYPE == FLOAT32
            x[i] = __uint_as_float(word[i]);
#else
            x[i] = from_half(word[i / 2] >> 16 * (i % 2) & 0xffff);
#endif
            if constexpr (SOFTCAP) z[i] = tile_max[row] + log2f(x[i]) * LN2;
            x[i] *= factor;
        }
        bool used = false;
#pragma unroll 1
        for (long long k = 0; k < p.K; ++k) {
            const long long target = p.targets[row * p.K + k], at = target - column;
            used |= target >= 0;
            if (target < 0 || at < 0 || at >= EACH) continue;
            const float own = exp_of(0, p.nll[row * p.K + k]) * a;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                if (i != at) continue;
                x[i] = own;
                if constexpr (SOFTCAP) z[i] = p.lse[row] - p.nll[row * p.K + k];
            }
        }
#pragma unroll 1
        for (long long k = 0; k < p.K; ++k) {
            const long long target = p.targets[row * p.K + k], at = target - column;
            if (target < 0 || at < 0 || at >= EACH) continue;
            const float g = p.g[row * p.K + k];
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                if (i == at) x[i] -= g;
            }
        }
        if constexpr (SOFTCAP) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const float ratio = fmaxf(z[i] / p.softcap, -1.0f);  // a masked entry's logit is -inf
                x[i] *= fmaxf(1 - ratio * ratio, 0.0f);
            }
        }
        if (!used) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) x[i] = 0;
        }
        uint4 out;
#if DTYPE == FLOAT32
        out = make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
#else
        out = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
#endif
        *reinterpret_cast<uint4*>(p.q + (row * p.pitch + column) * sizeof(element)) = out;
    }
}
