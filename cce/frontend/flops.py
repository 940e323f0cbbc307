"""The number of operations of the operators, for ``torch.utils.flop_counter``.

That module imports Triton, which importing this package must not: so it is told where it is found in use.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from cce.torch_private import dispatch_modes


def tell_counters() -> None:
    """Register the operators' costs with the counters that are active now, and with those to come."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    counters = (getattr(mode, "counter", None) for mode in dispatch_modes())
    tables = [counter.flop_registry for counter in counters if isinstance(counter, module.FlopCounterMode)]
    for table in (module.flop_registry, *tables):
        table.setdefault(torch.ops.cce.forward, _forward)
        table.setdefault(torch.ops.cce.backward, _backward)


def _forward(e: Tensor, c: Tensor, *rest: Any, **others: Any) -> int:
    """Operations of the product ``e c^T``."""
    return 2 * e.shape[0] * e.shape[1] * c.shape[0]


def _backward(e: Tensor, c: Tensor, *rest: Any, **others: Any) -> int:
    """Operations of recomputing the logits and of one product for each matrix whose gradient is wanted."""
    wanted = rest[-1].split(",")
    return (1 + ("e" in wanted) + ("c" in wanted)) * _forward(e, c)
