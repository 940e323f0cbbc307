"""The phases of a call under a given launch configuration, as the tuner runs them, and their expected results."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.triton.backend import TritonBackend
from cce.backends.triton.choice import float32_precision, launched_with
from cce.backends.triton.kernels.gradient import gradient_kernel
from cce.backends.triton.kernels.live import live_kernel
from cce.backends.triton.kernels.one_pass import store_kernel
from cce.backends.triton.kernels.products import products_kernel
from cce.backends.triton.kernels.statistics import statistics_kernel
from cce.backends.triton.launch import Launch
from cce.backends.triton.triton_private import compiled_versions, spilled_registers
from cce.frontend.rows import own_dtypes
from cce.spec import Spec

_BACKEND = TritonBackend()
_TILED = (statistics_kernel, gradient_kernel, live_kernel, products_kernel, store_kernel)
#: Most registers spilled per thread: a kernel that spills more spends its time on local memory. The shipped
#: configuration may spill more under options that fill the registers (tests/triton/spills.py); its spills are then the
#: limit.
MOST_SPILLED = 128
_PER_ROW = frozenset(field.name for field in fields(Outputs))
_ROWS = 4096  # rows compared at a time


class Work:
    """A call in phases.

    Args:
        inputs, problem, spec: arguments as a backend receives them.
        launch: configuration with whose results those of the others are compared.
    """

    def __init__(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, launch: Launch) -> None:
        self._inputs, self._problem, self._spec = inputs, problem, spec
        self._one_pass = _BACKEND.one_pass(problem, spec) and problem.needs_grad
        used = (inputs.targets >= 0).any(1)
        a = used / used.sum()  # weights of a mean
        g = a[:, None] * (inputs.targets >= 0) / problem.k
        self._upstream = Upstream(
            a,
            g,
            a if "entropy" in problem.outputs else None,
            a if "weighted_logit" in problem.outputs else None,
        )
        self._maps = self._new_maps()
        before = compiled()
        with self._under(launch):
            self._outputs = self._forward(self._maps)
            self._expected = self._results(self._outputs, self._maps)
        self._most_spilled = max(MOST_SPILLED, spilled_since(before))
        for name, x in self._expected.items():
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"e, c: got a {name} that is not finite everywhere, expected numbers to compare with")

    def run(self, kernel: str, launch: Launch) -> None:
        """Run the phase that uses ``kernel``, on the results of the forward."""
        with self._under(launch):
            if kernel == "forward":
                self._forward(self._maps)
            elif self._one_pass:
                self._in_one_pass()
            else:
                self._backward(self._outputs, self._maps)

    def fault(self, launch: Launch) -> str | None:
        """Reason not to use the configuration: it does not compile, does not fit, spills, or gives wrong results."""
        before, maps = compiled(), self._new_maps()
        try:
            with self._under(launch):
                found = self._results(self._forward(maps), maps)
            if self._inputs.e.is_cuda:
                torch.cuda.synchronize(self._inputs.e.device)
        except Exception as error:  # from the compiler, the driver, ...: all mean the same
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        registers = spilled_since(before)
        if registers > self._most_spilled:
            return f"spills {registers} registers per thread"
        for name, x in self._expected.items():
            # Values per row are logits and nats; scale by lse, the largest, since a mean of logits is nearly 0.
            gap = difference(found[name], x, self._expected["lse"] if name in _PER_ROW else x)
            if not gap <= self._tolerance(name):
                return f"{name} differs by {gap:.1e}, more than {self._tolerance(name):.1e}"
        return None

    def _tolerance(self, name: str) -> float:
        """Tolerance of a relative norm if products are summed in another order.

        It covers the float32 rounding of the sums at every step, on both sides; in gradients also the rounding of the
        products' factors and of the result, and with a filter, tiles within rounding of the threshold, which may or may
        not be computed.
        """
        problem, spec = self._problem, self._spec
        sums = 2 * torch.finfo(torch.float32).eps * (problem.d + problem.n + problem.v) ** 0.5
        if name in _PER_ROW:
            return sums
        flips = float(spec.threshold or 0) if spec.filter != "none" else 0.0
        factors = torch.finfo(problem.dtype).eps
        if problem.dtype == torch.float32 and float32_precision() == "tf32":
            factors = 2.0**-10
        return sums + max(factors, torch.finfo(self._expected[name].dtype).eps) + flips

    @contextmanager
    def _under(self, launch: Launch) -> Iterator[None]:
        with launched_with(launch), own_dtypes(self._inputs.e):
            yield

    def _new_maps(self) -> Maps[Tensor]:
        problem, spec = self._problem, self._spec
        shape, dtype = (spec.tiles(problem.v), problem.n), problem.map_dtype(spec)
        return Maps(**{name: self._inputs.e.new_empty(shape, dtype=dtype) for name in problem.maps(spec)})

    def _forward(self, maps: Maps[Tensor]) -> Outputs[Tensor]:
        return _BACKEND.forward(self._inputs, self._problem, self._spec, maps)

    def _backward(self, outputs: Outputs[Tensor], maps: Maps[Tensor]) -> Gradients[Tensor]:
        return _BACKEND.backward(self._inputs, self._problem, self._spec, outputs, maps, self._upstream)

    def _in_one_pass(self) -> Gradients[Tensor]:
        return _BACKEND.loss_and_gradients(self._inputs, self._problem, self._spec, self._upstream.g)[1]

    def _results(self, outputs: Outputs[Tensor], maps: Maps[Tensor]) -> dict[str, Tensor]:
        """Results that are sums of many products, by name."""
        found = _sums(outputs)
        if self._problem.needs_grad:
            found |= _sums(self._backward(outputs, maps))
        if self._one_pass:
            found |= {f"{name} in one pass": x for name, x in _sums(self._in_one_pass()).items()}
        return found


def _sums(results: Outputs[Tensor] | Gradients[Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in vars(results).items() if x is not None and x.is_floating_point()}


def difference(x: Tensor, expected: Tensor, unit: Tensor) -> float:
    """Relative difference ||x - expected|| / ||unit||, a few rows at a time: gradients may fill half of the memory."""
    pairs = zip(x.split(_ROWS), expected.split(_ROWS), strict=True)
    error = _norm(part.float() - other.float() for part, other in pairs)
    return error if error == 0 else error / max(_norm(unit.split(_ROWS)), sys.float_info.min)


def _norm(parts: Iterable[Tensor]) -> float:
    return float(sum(part.float().norm().double().square() for part in parts)) ** 0.5


def compiled() -> dict[int, Any]:
    """All versions of the kernels with tiles that this process has compiled, by id."""
    return {id(version): version for kernel in _TILED for version in compiled_versions(kernel)}


def spilled_since(before: Mapping[int, Any]) -> int:
    """Largest number of registers per thread spilled by a version compiled since ``before``."""
    return max((spilled_registers(new) for key, new in compiled().items() if key not in before), default=0)
