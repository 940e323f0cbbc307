"""Arrays that do not lie in memory one number after the other: the same bits as of their contiguous copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from calls import BACKEND, BLOCKS, Call
from torch import Tensor

from cce.backends.problem import Inputs, Upstream
from cce.backends.resolve import resolve
from cce.backends.triton.operands import tma_ready
from cce.spec import Spec

N, D, V, K = 11, 8, 40, 2


def around(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What lies between the numbers of ``x``: NaN; of integers a valid entry, that no read leaves its memory."""
    return x.new_full(shape, float("nan") if x.is_floating_point() else 0)


def column(x: Tensor) -> Tensor:
    """Last dimension in steps of 3, from an odd place on."""
    whole = around(x, (*x.shape[:-1], 3 * x.shape[-1] + 2))
    whole[..., 1 : 1 + 3 * x.shape[-1] : 3] = x
    return whole[..., 1 : 1 + 3 * x.shape[-1] : 3]


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T if x.ndim == 2 else column(x)


def part(x: Tensor) -> Tensor:
    """Of a longer tensor, from an odd place on."""
    whole = around(x, tuple(size + 5 for size in x.shape))
    inner = tuple(slice(1, 1 + size) for size in x.shape)
    whole[inner] = x
    return whole[inner]


def one_for_all(x: Tensor) -> Tensor:
    """The first number, or row, expanded."""
    return x[:1].expand(x.shape)


def one_a_row(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "column": column, "transposed": transposed, "part": part, "expanded": one_for_all, "expanded along rows": one_a_row,
}  # fmt: skip


def everything(spec: Spec | None, **options: object) -> Call:
    """Every array there is."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    targets = torch.randint(V, (N, K), generator=rng)
    targets[1::4, 1] = -1
    in_use = torch.ones(N, dtype=torch.bool)
    inputs = Inputs(draw(N + 4, D), draw(V, D), targets, draw(V), torch.arange(N) + torch.arange(N) // 4, in_use=in_use)
    if spec is None:
        return replace(Call(inputs, Upstream(draw(N), draw(N, K)), None), **options)
    inputs = replace(inputs, logit_weight=draw(V).abs(), vocab_order=torch.randperm(V, generator=rng))
    upstream = Upstream(draw(N), draw(N, K), draw(N), draw(N))
    return replace(Call(inputs, upstream, spec, prediction=True), **options)


CALLS = {
    "exact": everything(Spec(filter="none"), softcap=2.0),
    "filtered": everything(Spec(filter="element", **BLOCKS), logit_scale=1.5),
    "one pass": everything(None),
}
_PERMUTATIONS = ("rows", "vocab_order")  # one number is none


@cache
def as_they_are(name: str) -> dict[str, Tensor]:
    return CALLS[name].run()


def changed(call: Call, change: Callable[[Tensor], Tensor], arguments: Iterable[str]) -> Call:
    def of(fields: Any) -> Any:
        given = {name: x for name, x in vars(fields).items() if name in arguments and x is not None}
        return replace(fields, **{name: change(x) for name, x in given.items()})

    return replace(call, inputs=of(call.inputs), upstream=of(call.upstream))


@pytest.mark.parametrize("layout", ["column", "part", "expanded"])
@pytest.mark.parametrize("name", CALLS)
def test_vectors(name: str, layout: str) -> None:
    """All of them at once."""
    left_out = {"e", "c", *(_PERMUTATIONS if layout == "expanded" else ())}
    arguments = (vars(CALLS[name].inputs).keys() | vars(CALLS[name].upstream).keys()) - left_out
    strange = changed(CALLS[name], LAYOUTS[layout], arguments)
    assert not strange.inputs.bias.is_contiguous() or layout == "part"
    if layout == "expanded":
        same(strange.run(), changed(strange, Tensor.contiguous, arguments).run())
    else:
        same(strange.run(), as_they_are(name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["e", "c"])
@pytest.mark.parametrize("name", CALLS)
def test_matrices(name: str, argument: str, layout: str) -> None:
    strange = changed(CALLS[name], LAYOUTS[layout], [argument])
    plain = changed(strange, Tensor.contiguous, [argument])
    same(strange.run(), plain.run() if layout.startswith("expanded") else as_they_are(name), exact=False)


@pytest.mark.parametrize("name", ["exact", "filtered"])
def test_what_was_kept(name: str) -> None:
    """What a caller kept of the forward, as columns."""
    call = CALLS[name]
    outputs, maps, spec = call.forward()
    strange = replace(outputs, **{name: column(x) for name, x in vars(outputs).items()})
    same(vars(call.backward(strange, maps, spec)), as_they_are(name))


def same(found: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = True) -> None:
    """Bit for bit; a product of matrices may sum in another order where their layout is another."""
    for name, x in found.items():
        y = expected[name]
        tolerance = 0 if exact or not x.is_floating_point() else 2 * D * torch.finfo(torch.float32).eps
        assert torch.allclose(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max())), name


def test_work_list_of_strided_gradients() -> None:
    call = CALLS["filtered"]
    _, maps, spec = call.forward()
    upstream = Upstream(*(column(x) for x in (call.upstream.a, call.upstream.g, call.upstream.h)))
    plain = Upstream(*(x.contiguous() for x in (upstream.a, upstream.g, upstream.h)))
    found, expected = (BACKEND.work_list(call.inputs, call.problem, spec, maps, x) for x in (upstream, plain))
    assert all(torch.equal(getattr(found, name), x) for name, x in vars(expected).items())


def test_value_of_strided_weights() -> None:
    call = CALLS["one pass"]
    outputs = BACKEND.loss_and_gradients(call.inputs, call.problem, resolve(Spec(), call.problem), call.upstream.g)[0]
    expected = BACKEND.value(outputs, call.upstream.g)
    strange = replace(outputs, nll=transposed(outputs.nll))
    assert torch.equal(BACKEND.value(strange, column(call.upstream.g)), expected)


def test_no_tensor_map_of_rows_that_share_memory() -> None:
    """A stride of 0, or shorter than a row, is none that the hardware takes."""
    x = torch.zeros(64, 64)
    assert tma_ready(x) and tma_ready(x[:, :8]) and tma_ready(x[::2])
    assert not tma_ready(x[:1].expand(64, 64))
    assert not tma_ready(x.as_strided((8, 16), (4, 1)))
    assert not tma_ready(x.T) and not tma_ready(x[:, 1:])
