"""Rows without a target, where they are not left out: while a CUDA graph is captured, and under a filter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cce.backends.gpu.exact import _exact
from cce.backends.gpu.operands import Call
from cce.backends.gpu.used_rows import _as_zeros
from cce.backends.problem import Gradients, Maps
from cce.backends.resolve import resolve
from cce.spec import Spec
from cce.testing import Case
from cce.testing.data import make_inputs, make_problem, make_upstream
from cce.testing.kernels.plain import PlainKernels
from cce.testing.kernels.plain_backend import PlainBackend

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = Case("ignored", n=40, d=12, v=150, bias=True, outputs=("entropy",), data="peaked")
FILTER = Spec(filter="element", threshold=2.0**-9, block_n=16, block_v=32)


def both_ways(spec: Spec, c_value: float) -> tuple[Gradients[torch.Tensor], Gradients[torch.Tensor]]:
    """Rows that hold and get NaN, and a bias for which exp(z) is no float32; and those rows left out."""
    backend, problem = PlainBackend(), make_problem(CASE, "cpu")
    spec, exact = resolve(spec, problem), resolve(Spec(filter="none"), problem)
    inputs, upstream = make_inputs(CASE, "cpu"), make_upstream(CASE, "cpu", torch.float32)
    assert inputs.bias is not None and upstream.h is not None
    inputs = replace(inputs, bias=inputs.bias + 200)
    inputs.c[7] *= c_value
    ignored = slice(3, None, 5)
    inputs.targets[ignored] = -1
    for x in (inputs.e, upstream.a, upstream.g, upstream.h):
        x[ignored] = torch.nan
    maps = Maps(**{name: torch.zeros(spec.tiles(problem.v), problem.n) for name in problem.maps(spec)})
    outputs = backend.forward(inputs, problem, spec, maps)
    expected = backend.backward(inputs, problem, exact, outputs, Maps(), upstream)
    if spec.filter != "none":
        return backend.backward(inputs, problem, spec, outputs, maps, upstream), expected

    def of_all(inputs, problem, outputs, upstream):  # type: ignore[no-untyped-def]
        return _exact(Call.of(PlainKernels(), inputs, problem, spec), inputs, outputs, upstream)

    return _as_zeros(of_all, inputs, problem, outputs, upstream), expected


@pytest.mark.parametrize("spec", [Spec(filter="none"), FILTER], ids=["captured", "filtered"])
def test_they_are_worth_nothing(spec: Spec) -> None:
    for name, x, y in zip(
        ("de", "dc", "dbias"), *(vars(found).values() for found in both_ways(spec, 1.0)), strict=True
    ):
        assert bool(x.isfinite().all()), name
        assert (x - y).norm() <= (2.0**-18 if spec.filter == "none" else 0.05) * y.norm(), name


@pytest.mark.parametrize("spec", [Spec(filter="none"), FILTER], ids=["captured", "filtered"])
def test_they_stay_0_beside_nan_in_c(spec: Spec) -> None:
    found, _ = both_ways(spec, torch.nan)
    assert found.de is not None and not bool(found.de[3::5].any())
    assert bool(found.de[::5].isnan().all())
