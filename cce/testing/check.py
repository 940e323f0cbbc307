"""One case against the float64 reference: outputs, maps' decisions, live set and gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cce.backends.base import Backend
from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.resolve import resolve
from cce.reference import bounds, clear_threshold, error_norm, tiled
from cce.reference.backend import as_array, to_numpy
from cce.registry import refusals
from cce.spec import Spec
from cce.testing.cases import Case
from cce.testing.data import make_inputs, make_problem, make_upstream
from cce.testing.offsets import centred, recentred, without_column

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class Result:
    """Result of one case.

    Attributes:
        case: its name.
        errors: per quantity, ``||x - ref|| / bound``: at most 1 where the case passes.
        relative: per quantity, ``||x - ref|| / ||ref||``.
        live_fraction: of the reference.
        failures: one line each; empty if the case passed.
        refused: the backend's reasons, if it cannot run the case.
    """

    case: str
    errors: dict[str, float] = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)
    live_fraction: float = 1.0
    failures: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures and not self.refused


@dataclass(frozen=True)
class Oracle:
    """The reference's answer to a case."""

    problem: Problem
    spec: Spec
    inputs: Inputs[Tensor]
    upstream: Upstream[Tensor]
    outputs: Outputs[np.ndarray]
    gradients: Gradients[np.ndarray]
    row_live: np.ndarray
    live_fraction: float
    bounds: dict[str, float]
    case: Case
    column: tuple[np.ndarray, float] | None = None  # dC's last, of a case with an offset, and how far it may err

    @property
    def rounding_of_offset(self) -> float:
        """Largest rounding error of the (N,) log-sum-exps due to the offset alone."""
        unit = 2.0**-53 if self.problem.dtype == torch.float64 else 2.0**-24
        return math.sqrt(self.problem.n) * unit * abs(self.case.offset * self.case.logit_scale)


def solve(case: Case, device: str, product_roundoff: float = 0.0) -> Oracle:
    """Runs the reference, with a threshold that no backend's rounding can cross."""
    problem = make_problem(case, device)
    spec = resolve(case.make_spec(), problem)
    inputs = make_inputs(case, device)
    upstream = make_upstream(case, device, _DTYPES[str(spec.accumulate)])
    given, gradients_in = to_numpy(inputs), to_numpy(upstream)
    arrays = centred(case, given, zero="e")
    outputs, maps = tiled.forward(arrays, problem, spec)
    if spec.filter != "none":
        assert spec.threshold is not None
        clear = clear_threshold(arrays, problem, spec, outputs, maps, gradients_in, near=spec.threshold)
        spec = replace(spec, threshold=clear)
    work = tiled.work_list(arrays, problem, spec, outputs, maps, gradients_in)
    gradients = tiled.backward(arrays, problem, spec, outputs, maps, gradients_in)
    allowed = bounds(arrays, problem, spec, outputs, gradients_in, gradients, product_roundoff)
    column = None
    if case.offset and case.offset_by == "product" and problem.grad_c:
        arrays = centred(case, given, zero="c")
        other = tiled.backward(arrays, problem, spec, outputs, maps, gradients_in)
        assert other.dc is not None
        column = other.dc[:, -1], bounds(arrays, problem, spec, outputs, gradients_in, other, product_roundoff)["dc"]
    live = work.row_live, work.live_fraction
    return Oracle(problem, spec, inputs, upstream, outputs, gradients, *live, allowed, case, column)


def run_case(backend: Backend, case: Case, device: str = "cpu", product_roundoff: float = 0.0) -> Result:
    """Holds ``backend`` to the reference on one case.

    Args:
        backend: an instance.
        case: the case.
        device: where its tensors live.
        product_roundoff: 2**-10 where float32 products round their factors to tf32, else 0.
    """
    oracle = solve(case, device, product_roundoff)
    result = Result(case.name, live_fraction=oracle.live_fraction)
    result.refused = refusals(backend, oracle.problem, oracle.spec)
    if result.refused:
        return result
    maps = _poisoned_maps(oracle)
    before = _copies(oracle.inputs, oracle.upstream)
    with poisoned_allocations():
        outputs = backend.forward(oracle.inputs, oracle.problem, oracle.spec, maps)
        frozen = _copies(outputs, maps)
        gradients = backend.backward(oracle.inputs, oracle.problem, oracle.spec, outputs, maps, oracle.upstream)
    if not _same(before, _copies(oracle.inputs, oracle.upstream)) or not _same(frozen, _copies(outputs, maps)):
        result.failures.append("an argument of forward or backward was changed in place")
    _compare(result, oracle, "", (outputs, gradients), (oracle.outputs, oracle.gradients), oracle.bounds)
    _check_one_pass(result, oracle, backend)
    _compare_live(result, oracle, backend, maps)
    if bool((outputs.nll < 0).any()):
        result.failures.append("nll < 0")
    if outputs.entropy is not None and bool((outputs.entropy < 0).any()):
        result.failures.append("entropy < 0")
    return result


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Uninitialised tensors hold NaN inside, and an operation without a deterministic form raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products refuse the mode
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _poisoned_maps(oracle: Oracle) -> Maps[Tensor]:
    """NaN-filled maps whose rows are longer than N, as the front end passes them."""
    shape = (oracle.spec.tiles(oracle.problem.v), oracle.problem.n + 3)
    dtype = oracle.problem.map_dtype(oracle.spec)

    def make() -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=oracle.inputs.e.device)[:, : oracle.problem.n]

    return Maps(**{name: make() for name in oracle.problem.maps(oracle.spec)})


def _compare(
    result: Result,
    oracle: Oracle,
    prefix: str,
    found: tuple[Outputs[Tensor], Gradients[Tensor]],
    expected: tuple[Outputs[np.ndarray], Gradients[np.ndarray]],
    allowed: dict[str, float],
) -> None:
    """``found`` against ``expected``, of centred logits where they share an offset."""
    case, outputs, gradients = oracle.case, to_numpy(found[0]), to_numpy(found[1])
    if oracle.column is not None and not prefix and gradients.dc is not None:
        _compare_array(result, "dc_offset", gradients.dc[:, -1], *oracle.column)
    if prefix and outputs.lse_low is None:  # nobody reads it there
        allowed = {**allowed, "lse": allowed["lse"] + oracle.rounding_of_offset}
    outputs = recentred(case, to_numpy(oracle.inputs), outputs)
    pairs = ((outputs, expected[0]), (without_column(case, gradients), without_column(case, expected[1])))
    for holder, reference in pairs:
        for name, want in vars(reference).items():
            got, label = getattr(holder, name), prefix + name
            if name == "lse_low":  # optional, and compared as what it makes of p and nll
                continue
            if (got is None) != (want is None):
                result.failures.append(f"{label}: {'missing' if got is None else 'computed though not asked for'}")
            elif name == "prediction" and want is not None:
                _compare_prediction(result, oracle, got, want)
            elif want is not None:
                _compare_array(result, label, got, want, allowed[name])


def _check_one_pass(result: Result, oracle: Oracle, backend: Backend) -> None:
    """Check gradients computed along with the loss, if the backend does so, for a = sum_k g_k."""
    steps = backend.one_pass(oracle.problem, oracle.spec)
    if steps is None:
        return
    inputs, problem, spec = centred(oracle.case, to_numpy(oracle.inputs), zero="e"), oracle.problem, oracle.spec
    weights = oracle.upstream.g.masked_fill(oracle.inputs.targets < 0, 0)
    upstream = Upstream(a=as_array(weights).sum(1), g=as_array(weights))
    outputs, maps = tiled.forward(inputs, problem, spec)
    expected = tiled.backward(inputs, problem, spec, outputs, maps, upstream)
    allowed = bounds(inputs, problem, spec, outputs, upstream, expected)
    before = _copies(oracle.inputs)
    with poisoned_allocations():
        found = steps.loss_and_gradients(oracle.inputs, problem, spec, weights)
    if not _same(before, _copies(oracle.inputs)):
        result.failures.append("an argument of loss_and_gradients was changed in place")
    _compare(result, oracle, "one_pass_", found, (outputs, expected), allowed)


def _compare_array(result: Result, name: str, found: np.ndarray, expected: np.ndarray, allowed: float) -> None:
    if found.shape != expected.shape:
        result.failures.append(f"{name}: shape {found.shape}, expected {expected.shape}")
        return
    error, norm = error_norm(found, expected), float(np.linalg.norm(np.nan_to_num(expected, neginf=0.0)))
    result.errors[name] = error / allowed if allowed else float(error > 0)
    result.relative[name] = error / norm if norm else error
    if not error <= allowed:
        gap = np.abs(found - expected)
        worst = np.unravel_index(np.nanargmax(gap) if not np.isnan(gap).all() else 0, gap.shape)
        where = tuple(int(i) for i in worst)
        result.failures.append(
            f"{name}: relative error {result.relative[name]:.3g}, {result.errors[name]:.3g} times the bound; "
            f"worst at {where}: {found[worst]:.6g}, expected {expected[worst]:.6g}; not finite: "
            f"{int((~np.isfinite(found)).sum())}"
        )


def _compare_prediction(result: Result, oracle: Oracle, found: np.ndarray, expected: np.ndarray) -> None:
    """The same entry, or one whose logit is within rounding of the largest."""
    from cce.reference.dense import logits

    z = logits(centred(oracle.case, to_numpy(oracle.inputs), zero="e"), oracle.problem)
    if found.min(initial=0) < 0 or found.max(initial=0) >= z.shape[1]:
        result.failures.append(f"prediction: outside [0, {z.shape[1]})")
        return
    rows = np.arange(len(z))
    gap = np.abs(z[rows, expected] - z[rows, found]).max(initial=0.0)
    if not gap <= oracle.bounds["lse"] + 1e-12:
        result.failures.append(f"prediction: an entry whose logit is {gap:.3g} below the largest")


def _compare_live(result: Result, oracle: Oracle, backend: Backend, maps: Maps[Tensor]) -> None:
    if oracle.spec.filter == "none":
        return
    work = backend.work_list(oracle.inputs, oracle.problem, oracle.spec, maps, oracle.upstream)
    differ = int((as_array(work.row_live).astype(bool) != oracle.row_live).sum())
    if differ:
        result.failures.append(f"live set: differs from the reference's in {differ} of {oracle.row_live.size} places")
    if not 0.02 < oracle.live_fraction < 0.95:
        result.failures.append(f"case: live fraction {oracle.live_fraction:.3g} tests no filter")


def _copies(*holders: Any) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone() for holder in holders for x in vars(holder).values()]


def _same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(
        (x is None) == (y is None) and (x is None or y is None or torch.equal(x.nan_to_num(), y.nan_to_num()))
        for x, y in pairs
    )
