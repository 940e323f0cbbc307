"""A call like an earlier one skips what was checked and chosen then, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cce
from cce import registry
from cce.backends.torch import TorchBackend
from cce.frontend import again, checks

N, V, D = 6, 11, 4


class Counting(TorchBackend):
    """Tells its passes over the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def loss_and_gradients(self, *arguments: Any) -> Any:
        self.made.append("one pass")
        return super().loss_and_gradients(*arguments)

    def forward(self, *arguments: Any) -> Any:
        self.made.append("forward")
        return super().forward(*arguments)


@pytest.fixture
def backend() -> Iterator[Counting]:
    again._known.clear()
    cce.register_backend("counting", Counting)
    found = registry.load("counting")
    assert isinstance(found, Counting)
    yield found
    cce.unregister_backend("counting")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every call whose tensors were checked."""
    calls: list[str] = []
    original = checks.check_tensors
    monkeypatch.setattr(checks, "check_tensors", lambda *a, **k: (calls.append("checked"), original(*a, **k)))
    return calls


def leaves(**changes: Any) -> dict[str, Any]:
    e, c = torch.randn(N, D), torch.randn(V, D)
    targets = torch.tensor([3, -100, 10, 0, 5, 3])
    return {"e": e.requires_grad_(), "c": c.requires_grad_(), "targets": targets, "backend": "counting", **changes}


def dense(call: dict[str, Any]) -> Tensor:
    e, c, targets = call["e"].double(), call["c"].double(), call["targets"]
    bias = call.get("bias")
    z = torch.nn.functional.linear(e, c, None if bias is None else bias.double())
    reduction = call.get("reduction", "mean")
    return torch.nn.functional.cross_entropy(z.flatten(0, -2), targets.flatten().long(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_same_answer_without_the_checks(
    backend: Counting, checked: list[str], reduction: str, biased: bool
) -> None:
    for _ in range(3):
        more = {"bias": torch.randn(V, requires_grad=True)} if biased else {}
        call = leaves(reduction=reduction, **more)
        found, expected = cce.loss(**call), dense(call)
        torch.testing.assert_close(found, expected.float())
        wanted = [call["e"], call["c"], *more.values()]
        for x, y in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
            torch.testing.assert_close(x, y)
    assert checked == ["checked"] and backend.made == ["one pass"] * 3


def test_batches(backend: Counting, checked: list[str]) -> None:
    for _ in range(2):
        e = torch.randn(2, 3, D, requires_grad=True)
        call = leaves(e=e, targets=torch.randint(V, (3, 2)).T)
        (found,), (expected,) = (torch.autograd.grad(f(call), (e,)) for f in (lambda x: cce.loss(**x), dense))
        torch.testing.assert_close(found, expected)
    assert checked == ["checked"]


OTHERS: dict[str, dict[str, Any]] = {
    "shape": {"e": torch.randn(N + 1, D, requires_grad=True), "targets": torch.zeros(N + 1, dtype=torch.int64)},
    "dtype": {"e": torch.randn(N, D, dtype=torch.float64, requires_grad=True)},
    "targets' dtype": {"targets": torch.zeros(N, dtype=torch.int32)},
    "gradients": {"c": torch.randn(V, D)},
    "reduction": {"reduction": "sum"},
    "option": {"logit_scale": 2.0},
    "spec": {"spec": cce.Spec(filter="none")},
    "ignore_index": {"ignore_index": 3, "targets": torch.tensor([3, 1, 10, 0, 5, 3])},
    "bias": {"bias": torch.randn(V)},
    "a module's parameter": {"c": torch.nn.Parameter(torch.randn(V, D)), "shift": 0, "z_loss": 0},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_is_checked(backend: Counting, checked: list[str], name: str) -> None:
    cce.loss(**leaves())
    cce.loss(**leaves(**OTHERS[name]))
    assert len(checked) == 2


BAD: dict[str, dict[str, Any]] = {
    "ignore_index of another type": {"ignore_index": True},
    "scale of another type": {"logit_scale": True},
    "smoothing of another type": {"label_smoothing": False},
    "no name": {"reduction": ["mean"]},
    "spec": {"spec": "none"},
    "e": {"e": [[1.0] * D] * N},
    "sparse e": {"e": torch.eye(N, D).to_sparse().requires_grad_()},
    "targets' shape": {"targets": torch.zeros(N - 1, dtype=torch.int64)},
    "a target": {"targets": torch.full((N,), V)},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_errors_in_every_call(backend: Counting, name: str) -> None:
    """1 and True are equal, and equal as keys."""
    good = {"ignore_index": 1, "logit_scale": 1, "label_smoothing": 0, "targets": torch.tensor([3, 1, 10, 0, 5, 3])}
    cce.loss(**leaves(**good))
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            cce.loss(**leaves(**good | BAD[name]))


def test_what_has_no_such_pass_is_not_remembered(backend: Counting, checked: list[str]) -> None:
    for options in ({"reduction": "none"}, {"z_loss": 0.1}, {"label_smoothing": 0.1}, {"shift": 1}):
        for _ in range(2):
            cce.loss(**leaves(**options))
    for _ in range(2):
        with torch.no_grad():
            cce.loss(**leaves())
    for _ in range(2):
        with torch.autocast("cpu"):
            cce.loss(**leaves())
    assert len(checked) == 12
    assert not again._known or all(kind[1][3] == 0 for kind in again._known)


def test_another_backend_of_the_name(backend: Counting) -> None:
    class Other(Counting):
        pass

    cce.loss(**leaves())
    cce.register_backend("counting", Other, replace=True)
    cce.loss(**leaves())
    found = registry.load("counting")
    assert backend.made == ["one pass"] and isinstance(found, Other) and found.made == ["one pass"]


def test_no_more_are_kept_than_some(backend: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "_MOST", 3)
    for n in range(1, 9):
        cce.loss(**leaves(e=torch.randn(n, D, requires_grad=True), targets=torch.zeros(n, dtype=torch.int64)))
        assert len(again._known) <= 3


def test_compiled_code_and_transforms_do_without(backend: Counting, checked: list[str]) -> None:
    call = leaves()
    cce.loss(**call)
    torch.func.grad(lambda e: cce.loss(**{**call, "e": e}))(torch.randn(N, D))
    assert len(checked) == 2
