"""Tensors of any layout: kernels that read a pointer without strides get what they would read right."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cce.backends.gpu import backend as gpu_backend
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.operands import is_aligned
from cce.backends.problem import Gradients, Maps, Outputs, Problem
from cce.backends.resolve import resolve
from cce.spec import Spec
from cce.testing import Case
from cce.testing.data import make_inputs, make_problem, make_upstream
from cce.testing.kernels.plain import PlainKernels
from cce.testing.kernels.plain_backend import PlainBackend

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = (
    "target_logits", "statistics", "gradient", "live", "joined", "work_list", "dead_mass", "fill_maps", "mean_rows",
    "gather_rows", "scatter_rows",
)  # fmt: skip


def read(name: str, x: Any, any_strides: bool) -> Any:
    """A tensor as a kernel reads it: of ``e``, ``c`` and results the strides are told, of others none."""
    if isinstance(x, Tensor):
        if name in ("e", "c"):
            assert any_strides or is_aligned(x, x.dtype), f"{name}: strides {x.stride()}"
        elif name not in ("dz", "out", "total"):
            return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
        return x
    if not is_dataclass(x) or isinstance(x, (Problem, Spec, Maps)):
        return x
    return replace(x, **{field: read(field, value, any_strides) for field, value in vars(x).items()})  # type: ignore[type-var]


def by_pointer(method: Callable[..., Any]) -> Callable[..., Any]:
    names, any_strides = (
        list(inspect.signature(method).parameters)[1:],
        method.__name__ in ("target_logits", "work_list"),
    )

    def call(self: PlainKernels, *given: Any) -> Any:
        return method(self, *(read(name, x, any_strides) for name, x in zip(names, given, strict=True)))

    return call


ByPointer = type("ByPointer", (PlainKernels,), {name: by_pointer(getattr(PlainKernels, name)) for name in METHODS})


class PointerBackend(PlainBackend):
    def kernels(self) -> Kernels:
        return ByPointer()  # type: ignore[no-any-return]


def column(x: Tensor) -> Tensor:
    """Of a larger tensor, with something else beside it."""
    wide = torch.full((*x.shape, 3), 1, dtype=x.dtype)
    wide[..., 1] = x
    return wide[..., 1]


def every_second(x: Tensor) -> Tensor:
    return torch.stack([x, torch.zeros_like(x)], 1).flatten(0, 1)[::2]


def vectors_as(layout: Callable[[Tensor], Tensor], fields: Any) -> Any:
    return replace(fields, **{n: layout(x) for n, x in vars(fields).items() if x is not None and n not in ("e", "c")})


def results(
    case: Case, backend: PlainBackend, layout: Callable[[Tensor], Tensor], matrix: Callable[[Tensor], Tensor]
) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
    problem = make_problem(case, "cpu")
    spec = resolve(case.make_spec(), problem)
    inputs = vectors_as(layout, make_inputs(case, "cpu"))
    inputs = replace(inputs, e=matrix(inputs.e), c=matrix(inputs.c))
    upstream = vectors_as(layout, make_upstream(case, "cpu", torch.float32))
    maps = Maps(**{name: torch.zeros(spec.tiles(problem.v), problem.n) for name in problem.maps(spec)})
    outputs = backend.forward(inputs, problem, spec, maps)
    return outputs, backend.backward(inputs, problem, spec, vectors_as(layout, outputs), maps, upstream)


FILTER = {"filter": "element", "threshold": 2.0**-9, "block_n": 16, "block_v": 32}
BASE = Case("exact", n=40, d=12, v=150, k=2, bias=True, outputs=("entropy", "weighted_logit"), logit_weight=True)
CASES = (
    replace(BASE, spec={"filter": "none"}, softcap=5.0),
    replace(BASE, name="rows", spec={"filter": "none"}, m=50),
    replace(BASE, name="filtered", spec=FILTER, vocab_order=True, data="peaked"),
    replace(BASE, name="filtered rows", spec=FILTER, vocab_order=True, data="peaked", m=50, outputs=("prediction",)),
)
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "offset": lambda x: torch.cat([torch.ones(1), x.flatten()])[1:].view_as(x),
    "columns": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]],
    "every second": every_second,
}


@pytest.mark.parametrize("layout", [column, every_second], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vectors(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    same(results(case, PointerBackend(), layout, lambda x: x), results(case, PlainBackend(), torch.clone, lambda x: x))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrices(case: Case, matrix: str) -> None:
    expected = results(case, PlainBackend(), torch.clone, lambda x: x)
    same(results(case, PointerBackend(), torch.clone, MATRICES[matrix]), expected)


def same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """To rounding: the library multiplies matrices of other layouts in another order."""
    for mine, theirs in zip(found, expected, strict=True):
        for name, x in vars(theirs).items():
            if x is not None:
                torch.testing.assert_close(
                    getattr(mine, name), x, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_dropped_stride_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_backend, "contiguous", lambda fields: fields)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        test_vectors(case, column)


def test_one_row_expanded_is_not_aligned() -> None:
    row = torch.zeros(1, 8)
    assert is_aligned(row.repeat(5, 1), torch.float32) and not is_aligned(row.expand(5, 8), torch.float32)
    assert not is_aligned(torch.zeros(41)[1:].view(5, 8), torch.float32)
    assert not is_aligned(torch.zeros(8, 5).T, torch.float32)
