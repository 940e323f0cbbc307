"""Checks of the values of a recipe's tensors: probabilities, log-probabilities, entries of the vocabulary.

On a CPU a bad value raises a ValueError that names it, as for targets. On a GPU nothing waits for the check: it is a
device-side assertion, or the same ValueError with CCE_CHECK_TARGETS=1. Compiled and traced code, which cannot see
values, also uses assertions. NaN passes the checks: results computed from it are NaN, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from cce.frontend.tracing import traced
from cce.torch_private import without_transforms


def check_values(name: str, x: Tensor, bad: Callable[[Tensor], Tensor], expected: str) -> None:
    """Raise an error if ``bad(x)``, an elementwise condition, is true for any element."""
    x = _whole(x.detach())
    found = bad(x)
    if not _visible(x):
        torch._assert_async(~found.any(), f"{name}: got an unexpected value, expected {expected}")
    elif bool(found.any()):
        where = tuple(found.nonzero()[0].tolist())
        at = f" at index {where}" if where else ""
        raise ValueError(f"{name}: got {x[where].item()}{at}, expected {expected}")


def check_positive(name: str, x: Tensor) -> None:
    """Check for finite numbers above 0."""
    check_values(name, x, lambda x: ~((x > 0) & (x < torch.inf)), "a finite number > 0")


def check_log_prob(name: str, x: Tensor, dtype: torch.dtype, tokens: int = 1) -> None:
    """Check log-probabilities, of ``tokens`` tokens each, given in ``dtype``: above 0 by at most rounding."""
    most = slack(dtype) * max(tokens, 1)
    check_values(name, x, lambda x: x > most, "log-probabilities, at most 0")


def check_probabilities(name: str, x: Tensor, dtype: torch.dtype, *, sum_at_most_one: bool) -> None:
    """Check probabilities (..., K) given in ``dtype``; their sums may exceed 1 by its rounding."""
    check_values(name, x, lambda x: (x < 0) | (x == torch.inf), "probabilities, finite and at least 0")
    if sum_at_most_one:
        most = 1 + slack(dtype)
        check_values(f"{name}.sum(-1)", x.sum(-1), lambda x: x > most, "at most 1, as the rest belongs to the tail")


def check_in_vocabulary(name: str, x: Tensor, v: int, ignore_index: int) -> None:
    """Check for entries in [0, V), or ``ignore_index``."""
    expected = f"entries in [0, {v}) or ignore_index={ignore_index}"
    check_values(name, x, lambda x: ((x < 0) | (x >= v)) & (x != ignore_index), expected)


def slack(dtype: torch.dtype) -> float:
    """Allowance for rounding in values computed elsewhere in ``dtype``: the root of its epsilon, 3.5e-4 in float32.

    A tensor in float64 may have been computed in float32.
    """
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


def _visible(x: Tensor) -> bool:
    """Whether the values exist and may be waited for."""
    return not traced(x) and (x.device.type == "cpu" or os.environ.get("CCE_CHECK_TARGETS") == "1")


def _whole(x: Tensor) -> Tensor:
    """Tensor under the transforms of torch.func, with all its samples."""
    return x if torch.compiler.is_compiling() else without_transforms(x)
