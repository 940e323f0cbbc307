"""The order of the vocabulary that makes a tile's entries alike."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_logit_order(e: Tensor, c: Tensor, bias: Tensor | None, rows: Tensor | None, step: int = 4096) -> Tensor:
    """(V,) int64: vocabulary entries by their logit for the mean row of ``e``, largest first, ties by entry.

    Tiles of entries with like logits are live or dead as a whole, and what is dead is well described by its mean
    row. Computed once a call by the front end, so that every backend has the same tiles.

    Args:
        e: (M, D); rows: (N,) those in use, or None for all.
        c: (V, D); bias: (V,) or None.
        step: rows widened to float32 at a time.
    """
    wide = torch.promote_types(torch.promote_types(e.dtype, c.dtype), torch.float32)
    n = e.shape[0] if rows is None else len(rows)
    total = e.new_zeros(e.shape[1], dtype=wide)
    for i in range(0, n, step):
        total += (e[i : i + step] if rows is None else e[rows[i : i + step]]).sum(0, dtype=wide)
    logits = torch.cat([c[v : v + step].to(wide) @ (total / n) for v in range(0, c.shape[0], step)])
    if bias is not None:
        logits += bias.to(wide)
    return logits.argsort(descending=True, stable=True)
