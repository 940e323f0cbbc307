"""The targets' logits, by dot products of their own."""

import triton
import triton.language as tl

from cce.backends.triton.kernels.tiles import cap


@triton.jit
def target_logits_kernel(
    e, c, bias, targets, target_logits, used_e,
    D, K, stride_en, stride_ed, stride_cv, stride_cd, scale, softcap,
    BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, COPY: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute z[i, target] of one row and one of its K targets, a dot product; 0 without a target.

    COPY: also copy the rows of e to used_e [N, D], with zeros where there is no target, whatever e holds there; K is 1.
    """
    i, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    target = tl.load(targets + i * K + k)
    used = target >= 0
    products = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = (d < D) & used
        e_row = tl.load(e + i * stride_en + d * stride_ed, mask=inside, other=0.0)
        if COPY:
            tl.store(used_e + i * D + d, e_row, mask=d < D)
        c_row = tl.load(c + target * stride_cv + d * stride_cd, mask=inside, other=0.0).to(tl.float32)
        products += e_row.to(tl.float32) * c_row
    total = 0.0
    if used:
        z = cap(tl.sum(products, 0) + tl.zeros((1, 1), tl.float32), target + tl.zeros((1,), tl.int64),
                bias, scale, softcap, BIAS, SCALE, SOFTCAP)  # fmt: skip
        total = tl.sum(tl.sum(z, 1), 0)
    tl.store(target_logits + i * K + k, total)
