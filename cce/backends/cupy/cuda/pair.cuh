// A row's log-sum-exp as a pair of numbers, lse + lse_low, and the losses of its targets.
//
// Only differences of logits count, and a row's logits may share an offset at which float32 holds few digits of them.
#pragma once
#include "formula.cuh"

struct Pair {
    float lse, low;
};

// The sum of the largest logit m and log_s = log sum exp(z - m), rounded, and what rounding took from it (Knuth's
// two-sum); that is NaN where there is no softmax. A maximum of inf is the log-sum-exp, as one of -inf is.
__device__ __forceinline__ Pair pair_of(float m, float log_s) {
    const float lse = is_infinite(m) ? m : __fadd_rn(m, log_s), part = __fsub_rn(lse, m);
    const float low = __fadd_rn(__fsub_rn(m, __fsub_rn(lse, part)), __fsub_rn(log_s, part));
    return {lse, isfinite(lse) ? low : NOT_A_NUMBER};
}

// Totals of a row from its maximum m and the sum s relative to it: the pair, and nll_k = lse - target_logits_k of its K
// targets, 0 for none. A target's logit comes from another kernel, and its rounding may make it exceed the log-sum-exp:
// no nll may be negative.
__device__ __forceinline__ Pair join_targets(
    float m, float s, const float* target_logits, const long long* targets, long long K, float* nll) {
    const float log_s = logf(s);
    const Pair pair = pair_of(m, log_s);
    for (long long k = 0; k < K; ++k) {
        const float value = isfinite(pair.lse) ? log_s + (m - target_logits[k]) : NOT_A_NUMBER;
        nll[k] = targets[k] >= 0 && !(value < 0) ? value : 0.0f;
    }
    return pair;
}
