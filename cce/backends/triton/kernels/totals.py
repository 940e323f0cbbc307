"""Totals over the splits or tiles of a row: its log-sum-exp, as a pair of numbers, and its targets' losses."""

import triton
import triton.language as tl

from cce.backends.triton.kernels.tiles import INF, LN2


@triton.jit
def log_of_sum(s):
    """Logarithm of a sum of exp(z - m), one of which is 1; -inf for an empty sum.

    Near 1 it is a series, since the base-2 logarithm of a GPU has the absolute error of a number near 1, and a
    confident token's loss is small.
    """
    r = (s - 1) / (s + 1)
    square = r * r
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9))))
    return tl.where(tl.abs(s - 1) < 0.25, 2 * r * series, tl.log2(s) * LN2)


@triton.jit
def store_totals(m, log_sum, rows, used, N, K, target_logits, targets, lse, lse_low, nll):
    """Store lse, lse_low (N,) and nll (N, K) of some rows, from their maxima m and log sum exp(z - m); 0 if not used.

    Return whether each row has a finite log-sum-exp, and so a softmax.  # [BLOCK_N] each
    """
    where = rows.to(tl.int64) * K
    # The rounded sum, and its rounding error.
    total = m + log_sum
    added = total - m
    low = (m - (total - added)) + (log_sum - added)
    has_softmax = tl.abs(total) < INF
    tl.store(lse + rows, tl.where(used, total, 0.0), mask=rows < N)
    low = tl.where(has_softmax, low, float("nan"))
    tl.store(lse_low + rows, tl.where(used, low, 0.0), mask=rows < N)
    for k in range(K):
        target = tl.load(targets + where + k, mask=used, other=-1)
        z = tl.load(target_logits + where + k, mask=target >= 0, other=0.0)
        # The targets' logits come from another kernel, and their rounding may make them exceed the log-sum-exp: no loss
        # may be negative. (A NaN stays: where there is a softmax, it can only come from the other kernel's logit.)
        loss = log_sum + (m - z)
        loss = tl.where(has_softmax, tl.where(loss < 0, 0.0, loss), float("nan"))
        tl.store(nll + where + k, tl.where(target >= 0, loss, 0.0), mask=rows < N)
    return has_softmax
