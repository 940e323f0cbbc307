"""``torch.compile(fullgraph=True)`` and ``torch.export`` of the loss: one graph for all sizes, the eager numbers."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import cce

pytestmark = pytest.mark.usefixtures("one_thread")
V, D = 50, 8
SIZES = [(2, 7), (3, 9), (5, 12), (4, 6)]
FILTERED = cce.Spec(filter="element", threshold=0.03, block_n=4, block_v=8, vocab_order=range(V)[::-1])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shift-softcap": {"shift": 1, "softcap": 3.0, "logit_scale": 0.5},
    "smoothing-z_loss": {"label_smoothing": 0.1, "z_loss": 0.1, "shift": 1},
    "class-weights": {"weight": torch.linspace(0.5, 2, V), "reduction": "sum"},
    "per-token": {"reduction": "none", "backend": "torch"},
    "filtered": {"spec": FILTERED},
}


class Model(nn.Module):
    """An embedding, a layer, a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = cce.LinearCrossEntropy(D, V, bias=True, **options)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)).tanh(), targets)


def batch(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(sum(size))
    tokens, targets = (torch.randint(V, size, generator=rng) for _ in range(2))
    targets[0, :3] = -100
    return tokens, targets


def run(step: Any, model: nn.Module, *arguments: Tensor) -> list[Tensor]:
    """The loss, and the gradients of all parameters."""
    loss = step(*arguments)
    upstream = torch.linspace(-1, 2, loss.numel()).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), upstream)]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.shape == y.shape and (x - y).norm() <= 1e-6 * y.norm(), f"value {i}"


def with_each(first: Any, other: Any) -> list[tuple[str, Any]]:
    """Every option the first way, and those that differ in shapes the other way too."""
    return [*((name, first) for name in OPTIONS), *((name, other) for name in ("plain", "per-token", "filtered"))]


@pytest.mark.parametrize(("name", "dynamic"), with_each(True, None))
def test_one_graph_for_all_sizes(name: str, dynamic: bool | None) -> None:
    """Sizes are dynamic, or marked so."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Model(**OPTIONS[name])
    fast = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    compiled = []
    for size in SIZES:
        arguments = batch(size)
        for x in arguments if dynamic is None else ():
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        assert_near(run(fast, model, *arguments), run(model, model, *arguments))
        compiled.append(counter.frame_count)
    assert compiled[0] > 0 and set(compiled) == {compiled[0]}, f"graphs after each size: {compiled}"


def test_terms_give_the_eager_bits() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    e, c = torch.randn(5, 12, D), torch.randn(V, D)

    def step(e: Tensor, targets: Tensor) -> cce.Terms:
        return cce.terms(e, c, targets, shift=1, softcap=4.0)

    fast = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compiled = []
    for b, n in SIZES:
        arguments = e[:b, :n].clone(), batch((b, n))[1]
        for name, x, y in zip(cce.Terms._fields, fast(*arguments), step(*arguments), strict=True):
            assert x.shape == (b, n - 1) and torch.equal(x, y), name
        compiled.append(counter.frame_count)
    assert set(compiled) == {compiled[0]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = Model()

    def step(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(*arguments)

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (run(x, model, *batch((3, 9))) for x in (fast, step))
    assert_near(found, expected)
    plain = run(model, model, *batch((3, 9)))
    assert not torch.equal(found[0], plain[0]), "nothing was cast: this tests nothing"


def test_bad_target() -> None:
    """Found when the compiled code runs."""
    torch._dynamo.reset()
    model = Model()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    fast(*batch((2, 5)))
    tokens, targets = batch((2, 5))
    targets[1, 2] = V
    with pytest.raises(ValueError, match=f"targets: got {V}"):
        fast(tokens, targets)


@pytest.mark.parametrize(("name", "strict"), with_each(False, True))
def test_export(name: str, strict: bool) -> None:
    """Of the module, with both sizes dynamic; after a trip through a file it gives the same loss and gradients."""
    torch._dynamo.reset()
    head = cce.LinearCrossEntropy(D, V, bias=True, **{"backend": "torch", **OPTIONS[name]})
    # A sequence has to be longer than two: torch.export takes sizes of 1, which a shift makes of 2, for constants.
    b, n = torch.export.Dim("b", min=2, max=64), torch.export.Dim("n", min=3, max=64)
    example = torch.randn(4, 6, D), batch((4, 6))[1]
    program = torch.export.export(head, example, dynamic_shapes=({0: b, 1: n}, {0: b, 1: n}), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in SIZES:
        arguments = torch.randn(*size, D), batch(size)[1]
        assert_near(run(loaded, loaded, *arguments), run(head, head, *arguments))


def test_export_without_gradients() -> None:
    """A program exported under no_grad computes losses; what it did not keep for gradients, it says."""
    arguments = torch.randn(4, 6, D), batch((4, 6))[1]
    for spec in (cce.Spec(filter="none"), FILTERED):
        head = cce.LinearCrossEntropy(D, V, backend="torch", spec=spec)
        with torch.no_grad():
            program = torch.export.export(head, arguments).module()
            assert torch.equal(program(*arguments), head(*arguments))
        if spec is FILTERED:
            with pytest.raises(RuntimeError, match="traced under"):
                program(*arguments).backward()
        else:
            assert_near(run(program, program, *arguments), run(head, head, *arguments))


def test_another_number_of_targets() -> None:
    """K becomes a symbol, beside sizes that are constants."""
    rng = torch.Generator().manual_seed(0)
    e, c = torch.randn(6, 4, generator=rng), torch.randn(9, 4, generator=rng)
    step = torch.compile(lambda y, w: cce.loss(e, c, y, target_weight=w), fullgraph=True, backend="eager")
    for k in (3, 4, 5):
        y, w = torch.randint(9, (6, k), generator=rng), torch.rand(6, k, generator=rng)
        torch.testing.assert_close(step(y, w), cce.loss(e, c, y, target_weight=w))
