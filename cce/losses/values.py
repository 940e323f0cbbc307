"""Checks of the values of a recipe's tensors: probabilities, log-probabilities, entries of the vocabulary.

On a CPU a bad value is a ValueError that names it, as for targets. On a GPU nothing waits for it: it is a device-side
assertion, or the same ValueError with CCE_CHECK_TARGETS=1. So it is in compiled and traced code, which sees no values.
Values that are not numbers pass: what is computed of them is none either.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from cce.frontend.tracing import traced
from cce.torch_private import without_transforms


def check_values(name: str, x: Tensor, bad: Callable[[Tensor], Tensor], expected: str) -> None:
    """An error where ``bad(x)``, an elementwise condition, is true of any element."""
    x = _whole(x.detach())
    found = bad(x)
    if not _visible(x):
        torch._assert_async(~found.any(), f"{name}: got a value outside of what is expected, {expected}")
    elif bool(found.any()):
        where = tuple(found.nonzero()[0].tolist())
        at = f" at index {where}" if where else ""
        raise ValueError(f"{name}: got {x[where].item()}{at}, expected {expected}")


def check_positive(name: str, x: Tensor) -> None:
    """Finite numbers above 0."""
    check_values(name, x, lambda x: ~((x > 0) & (x < torch.inf)), "a finite number > 0")


def check_log_prob(name: str, x: Tensor, dtype: torch.dtype, tokens: int = 1) -> None:
    """Log-probabilities, of ``tokens`` tokens each, that came in ``dtype``: above 0 by rounding at most."""
    most = slack(dtype) * max(tokens, 1)
    check_values(name, x, lambda x: x > most, "log-probabilities, at most 0")


def check_probabilities(name: str, x: Tensor, dtype: torch.dtype, *, sum_at_most_one: bool) -> None:
    """Probabilities (..., K) that came in ``dtype``; their sums may exceed 1 by its rounding."""
    check_values(name, x, lambda x: (x < 0) | (x == torch.inf), "probabilities, finite and at least 0")
    if sum_at_most_one:
        most = 1 + slack(dtype)
        check_values(f"{name}.sum(-1)", x.sum(-1), lambda x: x > most, "at most 1, as what is left is the tail's")


def check_in_vocabulary(name: str, x: Tensor, v: int, ignore_index: int) -> None:
    """Entries in [0, V), or ``ignore_index``."""
    expected = f"entries in [0, {v}) or ignore_index={ignore_index}"
    check_values(name, x, lambda x: ((x < 0) | (x >= v)) & (x != ignore_index), expected)


def slack(dtype: torch.dtype) -> float:
    """By how much rounding moves what others computed in ``dtype``: the root of its epsilon, 3.5e-4 in float32.

    A tensor in float64 may have been computed in float32.
    """
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


def _visible(x: Tensor) -> bool:
    """Whether the values are there and may be waited for."""
    return not traced(x) and (x.device.type == "cpu" or os.environ.get("CCE_CHECK_TARGETS") == "1")


def _whole(x: Tensor) -> Tensor:
    """The tensor under the transforms of torch.func, all samples of it."""
    return x if torch.compiler.is_compiling() else without_transforms(x)
