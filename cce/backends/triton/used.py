"""Which rows have a target: the exact backward leaves the others out, and so must know how many there are.

The question is put to the GPU before the forward's kernels, and the answer is looked at in the backward: it is there
long before these kernels are done, so that the host prepares the backward's launches while the forward runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce.rows import rows_in_use

_NAME = "_cce_rows_in_use"  # of an attribute of the targets, which autograd keeps for the backward as they are


def ask(targets: Tensor) -> None:
    """Has the number of rows with a target copied to the host, some time later."""
    if not targets.is_cuda or torch.cuda.is_current_stream_capturing():
        return
    count = torch.empty((), dtype=torch.int64, pin_memory=True)
    count.copy_((targets >= 0).any(1).sum(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    setattr(targets, _NAME, (targets._version, event, count))


def rows_with_target(targets: Tensor, in_use: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """As :func:`cce.rows.rows_in_use`; waits for no more than the answer where :func:`ask` has been called."""
    asked: tuple[int, torch.cuda.Event, Tensor] | None = getattr(targets, _NAME, None)
    if asked is None or in_use is not None or asked[0] != targets._version:
        return rows_in_use(targets, in_use)
    _, event, count = asked
    event.synchronize()
    if int(count) == len(targets):
        return None, targets
    rows = (targets < 0).all(1).to(torch.int8).argsort(stable=True)[: int(count)]
    return rows, targets.index_select(0, rows)
