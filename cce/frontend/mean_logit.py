"""The order of the vocabulary that makes a tile's entries alike."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_logit_order(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, step: int = 4096) -> Tensor:
    """(V,) int64: vocabulary entries by their logit for the mean row of ``e``, largest first, ties by entry.

    Tiles of entries with like logits are live or dead as a whole, and what is dead is well described by its mean
    row. Computed once a call by the front end, so that every backend has the same tiles; nothing waits for a GPU.

    Args:
        e: (M, D).
        c: (V, D); bias: (V,) or None.
        targets: (M, K), all -1 in rows that do not count.
        step: rows widened to float32 at a time.
    """
    wide = torch.promote_types(torch.promote_types(e.dtype, c.dtype), torch.float32)
    in_use = (targets >= 0).any(1)
    total = e.new_zeros(e.shape[1], dtype=wide)
    for i in range(0, e.shape[0], step):
        # Not a product with 0: a row that does not count may be NaN.
        total += torch.where(in_use[i : i + step, None], e[i : i + step], 0).sum(0, dtype=wide)
    logits = _products(c, total / in_use.sum().clamp(min=1), step)
    if bias is not None:
        logits += bias.to(wide)
    return logits.argsort(descending=True, stable=True)


def _products(c: Tensor, mean: Tensor, step: int) -> Tensor:
    """(V,) c mean, in the dtype of ``mean``."""
    if c.device.type == "cuda" and torch.version.hip is None and c.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(c, mean.to(c.dtype)[:, None], out_dtype=mean.dtype)[:, 0]
    return torch.cat([c[v : v + step].to(mean.dtype) @ mean for v in range(0, c.shape[0], step)])
