"""Tensors without values, and code that watches the operators: shapes as the dense formula has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cce

N, D, V = 5, 8, 20
LOSSES: dict[str, Callable[..., Tensor]] = {
    "mean": lambda e, c, t: cce.loss(e, c, t),
    "none": lambda e, c, t: cce.loss(e, c, t, reduction="none").sum(),
    "smoothed": lambda e, c, t: cce.loss(e, c, t, label_smoothing=0.1),
    "terms": lambda e, c, t: sum(x.sum() for x in cce.terms(e, c, t)[:3]),
    "shift": lambda e, c, t: cce.loss(e[None], c, t[None], shift=1),
}
each = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each
def test_meta(loss: Callable[..., Tensor]) -> None:
    e, c = (torch.empty(x, D, device="meta", requires_grad=True) for x in (N, V))
    found = loss(e, c, torch.empty(N, dtype=torch.int64, device="meta"))
    found.backward()
    assert found.shape == () and found.is_meta and e.grad is not None and c.grad is not None
    assert e.grad.shape == e.shape and c.grad.shape == c.shape


def test_meta_module() -> None:
    head = cce.LinearCrossEntropy(D, V, device="meta")
    assert head(torch.empty(2, N, D, device="meta"), torch.empty(2, N, dtype=torch.int64, device="meta")).is_meta


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match=r"^c: got device cpu, expected meta"):
        cce.loss(torch.empty(N, D, device="meta", requires_grad=True), torch.ones(V, D), torch.arange(N))


@each
def test_fake(loss: Callable[..., Tensor]) -> None:
    with FakeTensorMode():
        e, c = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        loss(e, c, torch.randint(V, (N,))).backward()
        assert e.grad is not None and e.grad.shape == (N, D) and c.grad is not None and c.grad.shape == (V, D)


@each
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str, loss: Callable[..., Tensor]) -> None:
    """What was traced computes the loss of other values, and refuses a target outside of the vocabulary."""
    rng = torch.Generator().manual_seed(0)
    first, second = ((torch.randn(N, D, generator=rng), torch.randn(V, D, generator=rng)) for _ in range(2))
    targets = torch.randint(V, (N,), generator=rng)
    traced = make_fx(loss, tracing_mode=mode)(*first, targets)
    torch.testing.assert_close(traced(*second, targets.flip(0)), loss(*second, targets.flip(0)))
    with pytest.raises(ValueError, match="targets: got 20"):
        traced(*second, torch.full_like(targets, V))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_flops_are_counted(reduction: str) -> None:
    """A product forward, and backward the logits again and a product for each gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    for grads in ((True, True), (True, False)):
        e, c = (torch.randn(x, D, requires_grad=grad) for x, grad in zip((N, V), grads, strict=True))
        with FlopCounterMode(display=False) as counter:
            cce.loss(e, c, torch.arange(N), reduction=reduction).sum().backward()
        assert counter.get_total_flops() == (2 + sum(grads)) * 2 * N * D * V


def compilations(loss: Callable[..., Tensor], backend: Any) -> int:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    rng = torch.Generator().manual_seed(0)
    e, c, t = torch.randn(N, D, generator=rng), torch.randn(V, D, generator=rng), torch.arange(N)
    for scale in (1.0, 0.9, 0.8, 0.7, 0.6):
        x = e.clone().requires_grad_()
        y = e.clone().requires_grad_()
        found, expected = compiled(x, c, t, scale), F.cross_entropy(y @ c.T * scale, t)
        found.backward()
        expected.backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(x.grad, y.grad)
    return counter.frame_count


def test_a_changing_scale_is_compiled_once() -> None:
    """Once as a constant, then as an input, as numbers are: not once a value."""
    own = compilations(lambda e, c, t, s: cce.loss(e, c, t, logit_scale=s), "aot_eager")
    assert own <= compilations(lambda e, c, t, s: F.cross_entropy(e @ c.T * s, t), "aot_eager") + 1


def test_a_spec_made_inside_of_compiled_code() -> None:
    torch._dynamo.reset()
    e, c, t = torch.randn(N, D), torch.randn(V, D), torch.arange(N)
    compiled = torch.compile(
        lambda e: cce.loss(e, c, t, spec=cce.Spec(lse_accumulation="online")), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(e), cce.loss(e, c, t))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_gradient_of_compiled_code(backend: str) -> None:
    torch._dynamo.reset()
    e, c, t = torch.randn(N, D), torch.randn(V, D), torch.arange(N)
    found = torch.func.grad(torch.compile(lambda e: cce.loss(e, c, t), backend=backend))(e)
    torch.testing.assert_close(found, torch.func.grad(lambda e: F.cross_entropy(e @ c.T, t))(e))


def test_another_default_device() -> None:
    """Nothing is made where the arguments are not."""
    e, c, t = torch.randn(N, D), torch.randn(300, D), torch.arange(N)
    torch.set_default_device("meta")
    try:
        spec = cce.Spec(filter="element", threshold=1e-3, vocab_order=list(range(300)))
        assert spec.permutation is not None and spec.permutation.device.type == "cpu"
        assert 0 <= cce.live_fraction(e, c, t, spec=spec) <= 1
        assert cce.loss(e, c, t, spec=spec).item() > 0
    finally:
        torch.set_default_device(None)
