"""Problems of the reference's tests: data that exercises every option, and data with dead tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from cce.backends.problem import EXTRA_OUTPUTS, Inputs, Problem, Upstream
from cce.backends.resolve import resolve
from cce.spec import Spec

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    inputs: Inputs[Array]
    problem: Problem
    upstream: Upstream[Array]

    def spec(self, **fields: Any) -> Spec:
        return resolve(Spec(**fields), self.problem)


def as_stored(x: Array, dtype: torch.dtype) -> Array:
    """``x`` rounded to ``dtype``, as float64."""
    return torch.from_numpy(x).to(dtype).double().numpy()


def _case(
    n: int = 13,
    v: int = 29,
    d: int = 5,
    k: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: bool = True,
    rows: bool = True,
    outputs: tuple[str, ...] = EXTRA_OUTPUTS,
    order: bool = False,
    seed: int = 0,
) -> Case:
    """Random data with a target named twice, one missing, and a row that asks for nothing."""
    rng = np.random.default_rng(seed)
    m = n + 4 if rows else n
    targets = rng.integers(0, v, (n, k))
    targets[0, -1] = targets[0, 0]
    targets[n // 2] = -1
    a, g, h, s = rng.normal(size=n), rng.normal(size=(n, k)), rng.normal(size=n), rng.normal(size=n)
    for x in (a, g, h, s):
        x[n // 2] = 0.0
    inputs = Inputs(
        e=as_stored(rng.normal(size=(m, d)), dtype),
        c=as_stored(rng.normal(size=(v, d)), dtype),
        targets=targets,
        bias=as_stored(rng.normal(size=v), dtype) if bias else None,
        rows=np.sort(rng.choice(m, n, replace=False)) if rows else None,
        logit_weight=rng.uniform(size=v),
        vocab_order=rng.permutation(v) if order else None,
    )
    problem = _problem(inputs, dtype, softcap=softcap, logit_scale=logit_scale, outputs=frozenset(outputs))
    upstream = Upstream(a, g, h if "entropy" in outputs else None, s if "weighted_logit" in outputs else None)
    return Case(inputs, problem, upstream)


def _peaked(
    n: int = 60,
    v: int = 400,
    d: int = 24,
    *,
    dtype: torch.dtype = torch.float64,
    softcap: float | None = None,
    outputs: tuple[str, ...] = (),
    seed: int = 0,
) -> Case:
    """A trained classifier in small: Zipf's law in the bias, rows of ``c`` that share a large mean, peaked rows."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=d)
    c = mean + 0.8 * rng.normal(size=(v, d))
    targets = np.minimum(rng.zipf(1.5, (n, 1)) - 1, v - 1)
    e = 0.25 * rng.normal(size=(n, d)) + 0.15 * (c[targets[:, 0]] - mean)
    inputs = Inputs(
        e=as_stored(e, dtype),
        c=as_stored(c, dtype),
        targets=targets,
        bias=as_stored(-1.5 * np.log1p(np.arange(v)), dtype),
    )
    problem = _problem(inputs, dtype, softcap=softcap, outputs=frozenset(outputs))
    a = rng.uniform(0.5, 1.5, n)
    h = rng.normal(size=n) if "entropy" in outputs else None
    s = rng.normal(size=n) if "weighted_logit" in outputs else None
    return Case(inputs, problem, Upstream(a, a[:, None].copy(), h, s))


def _problem(inputs: Inputs[Array], dtype: torch.dtype, **fields: Any) -> Problem:
    (n, k), (v, d) = inputs.targets.shape, inputs.c.shape
    bias = inputs.bias is not None
    fields |= {"e_dtype": dtype, "c_dtype": dtype, "bias": bias, "grad_e": True, "grad_c": True, "grad_bias": bias}
    return Problem(n, v, d, k, **fields)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return _case


@pytest.fixture(scope="session")
def make_peaked() -> Callable[..., Case]:
    return _peaked
