"""Resolution of a spec: fields the user left open are set from the problem before a backend receives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import torch

from cce.backends.problem import Problem
from cce.spec import Spec

# Skipping tiles below these thresholds, with compensation, causes no more error than a dense computation in the dtype
# (docs/numerics.md has the measurements). The more entries there are, the smaller is each one's share: in a large
# vocabulary, the threshold is a multiple of 1/V (docs/decisions/0005).
_THRESHOLD = {torch.float16: 2.0**-16}
_THRESHOLD_ELSE = 2.0**-13
_TIMES_UNIFORM = 12

# Tile sizes of a GPU's matrix unit. Narrower blocks would skip more on a CPU, but with a larger error at a given
# threshold (docs/numerics.md); with one size, every device finds the same live tiles.
_BLOCK_N, _BLOCK_V = 128, 128


def resolve(spec: Spec, problem: Problem, whole: int | None = None) -> Spec:
    """Resolve a spec for a problem: the result has no field left at None.

    Args:
        spec: as the user gave it.
        problem: problem to resolve it for.
        whole: size of the whole vocabulary where ``c`` holds a part of it; it determines the default threshold.
    """
    whole = problem.v if whole is None else whole
    # Under torch.compile numbers may be symbols, which cannot be keys of a cache.
    sizes = (whole, problem.n, problem.v, problem.d, problem.k)
    if all(isinstance(x, int) for x in sizes) and isinstance(problem.logit_scale, (int, float)):
        found = _kept(spec.key, problem, whole)
    else:
        found = _resolved(Spec.from_key(spec.key), problem, whole)
    return found if spec.permutation is None else found.with_permutation_of(spec)


@lru_cache(maxsize=256)
def _kept(key: str, problem: Problem, whole: int) -> Spec:
    return _resolved(Spec.from_key(key), problem, whole)


def _resolved(spec: Spec, problem: Problem, whole: int) -> Spec:
    filter = _filter(spec.filter, problem)
    return dataclasses.replace(
        spec,
        block_n=spec.block_n or _BLOCK_N,
        block_v=spec.block_v or _BLOCK_V,
        filter=filter,
        threshold=spec.threshold or _default_threshold(whole, problem.dtype),
        accumulate="float64" if problem.dtype == torch.float64 else spec.accumulate or "float32",
        vocab_order=_order(spec.vocab_order, filter, problem),
    )


def _filter(filter: str | None, problem: Problem) -> str:
    # A weighted sum of capped logits has a gradient of the same size in every tile: nothing may be skipped.
    if problem.softcap is not None and "weighted_logit" in problem.outputs:
        return "none"
    return filter or "none"


def _default_threshold(v: int, dtype: torch.dtype) -> float:
    most = _THRESHOLD.get(dtype, _THRESHOLD_ELSE)
    # While torch.compile traces, V may be a symbol; the compiled call resolves again with the number.
    return min(most, _TIMES_UNIFORM / v) if isinstance(v, int) and v > 0 else most


def _order(
    order: torch.Tensor | Sequence[int] | str | None, filter: str, problem: Problem
) -> torch.Tensor | Sequence[int] | str:
    # A vocabulary order is worth its gathers only where tiles will be skipped.
    if filter == "none" or not problem.needs_grad:
        return "natural"
    return order or "mean_logit"
