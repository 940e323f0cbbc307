"""The loss in a training step: mixed precision with a GradScaler, checkpointing, modules in another dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cce
from cce.backends.torch import TorchBackend

pytestmark = pytest.mark.usefixtures("one_thread")
V, D, N = 40, 8, 24
LOW = [torch.bfloat16, torch.float16]


def data() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(2)
    x, targets = torch.randn(N, D, generator=rng), torch.randint(V, (N,), generator=rng)
    targets[::7] = -100
    return x, targets


class Model(nn.Module):
    """A layer and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(D, D), cce.LinearCrossEntropy(D, V, bias=True, **options)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return self.head(self.body(x).tanh(), targets)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=["one-pass", "general"])
@pytest.mark.parametrize("dtype", LOW)
def test_scaler_scales(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Gradients of a scaled loss, unscaled, are those of the loss; float32 as the parameters are."""
    model = Model(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients = []
    for scale in (1.0, 2.0**10):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(*data())
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append([p.grad.clone() for p in model.parameters()])
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    for x, y in zip(*gradients, strict=True):
        assert x.dtype == torch.float32 and relative(x, y) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=["one-pass", "general"])
def test_scaler_sees_an_overflow(options: dict[str, Any]) -> None:
    """A scale beyond fp16 gives inf in the gradients: the step is left out and the scale halved."""
    model = Model(**options)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", torch.float16):
        loss = model(*data())
    scaler.scale(loss).backward()
    assert not model.head.weight.grad.isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_scaler_trains() -> None:
    """From a scale that is too large at first."""
    model = Model()
    optimizer, scaler = torch.optim.Adam(model.parameters(), lr=0.05), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(*data())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0] and scaler.get_scale() < 2.0**24


class Counting(TorchBackend):
    """Notes its passes over the logits."""

    name = "counting"
    passes: ClassVar[list[str]] = []

    def forward(self, *arguments: Any) -> Any:
        self.passes.append("forward")
        return super().forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        self.passes.append("backward")
        return super().backward(*arguments)

    def loss_and_gradients(self, *arguments: Any) -> Any:
        self.passes.append("both")
        return super().loss_and_gradients(*arguments)


@pytest.fixture
def counting() -> Iterator[str]:
    cce.register_backend("counting", Counting)
    yield "counting"
    cce.unregister_backend("counting")


FILTERED = cce.Spec(filter="element", threshold=0.04, block_n=4, block_v=8)
# Options; the passes in a checkpoint that is not reentrant, and in one that is: its first forward knows of no gradient.
CHECKPOINTED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "one-pass": ({}, ["both", "both"], ["forward", "both"]),
    "general": ({"z_loss": 0.1}, ["forward", "forward", "backward"], ["forward", "forward", "backward"]),
    "filtered": ({"spec": FILTERED}, ["forward", "forward", "backward"], ["forward", "forward", "backward"]),
}


@pytest.mark.parametrize(("options", "kept", "reentrant"), CHECKPOINTED.values(), ids=CHECKPOINTED)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_checkpoint(
    autocast: bool, use_reentrant: bool, options: dict[str, Any], kept: list[str], reentrant: list[str], counting: str
) -> None:
    """The same gradients to the bit, for one more forward."""
    model = Model(backend=counting, **options)
    x, targets = data()
    x.requires_grad_()

    def run(step: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        Counting.passes.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = step(x, targets)
        leaves = [x, *model.parameters()]
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in leaves]

    expected, gradients = run(model)
    loss, found = run(lambda *arguments: checkpoint(model, *arguments, use_reentrant=use_reentrant))
    assert relative(loss, expected) <= 1e-6
    assert all(x is not None and torch.equal(x, y) for x, y in zip(found, gradients, strict=True))
    if not autocast:
        assert Counting.passes == (reentrant if use_reentrant else kept)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, "to"], ids=["half", "bfloat16", "to"])
def test_module_in_another_dtype(dtype: torch.dtype, convert: Callable[[nn.Module], nn.Module] | str) -> None:
    head = cce.LinearCrossEntropy(D, V, bias=True)
    head = head.to(dtype) if isinstance(convert, str) else convert(head)
    x, targets = data()
    e = x.to(head.weight.dtype).requires_grad_()
    loss = head(e, targets)
    loss.backward()
    wide = [x.detach().double().requires_grad_() for x in (e, head.weight, head.bias)]
    expected = F.cross_entropy(F.linear(*wide), targets)
    expected.backward()
    assert loss.dtype == torch.float32 and relative(loss.detach(), expected.detach()) <= 1e-6
    for found, want in zip((e, head.weight, head.bias), wide, strict=True):
        assert found.grad.dtype == head.weight.dtype
        assert relative(found.grad, want.grad) <= torch.finfo(head.weight.dtype).eps


def test_a_tied_weight_stays_tied() -> None:
    """In a copy, and in another dtype; both uses add up as in the dense model."""
    model = nn.ModuleDict({"embedding": nn.Embedding(V, D), "head": cce.LinearCrossEntropy(D, V)})
    model["head"].weight = model["embedding"].weight
    _, targets = data()
    for other in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        table = other["embedding"].weight
        assert other["head"].weight is table
        other.zero_grad()
        other["head"](other["embedding"](targets.clamp(min=0)), targets).backward()
        dense = table.detach().double().requires_grad_()
        F.cross_entropy(F.linear(dense[targets.clamp(min=0)], dense), targets).backward()
        assert relative(table.grad, dense.grad) <= 1e-6
