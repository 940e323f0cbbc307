"""A call is decided once: by its kind, for all its operators, and for whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cce
from cce import registry
from cce.backends.problem import Problem
from cce.backends.torch import TorchBackend
from cce.frontend import checks, decision

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
    decision._known.clear()
    decision._calls.clear()
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


ORDINARY: dict[str, dict[str, Any]] = {
    "per token": {"reduction": "none"},
    "z_loss": {"z_loss": 0.1},
    "smoothed": {"label_smoothing": 0.1},
    "shifted": {"shift": 1},
    "filtered": {"spec": cce.Spec(filter="element", block_n=2, block_v=4)},
    "capped": {"softcap": 3.0},
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ORDINARY)
def test_calls_of_two_passes_are_known_too(backend: Counting, checked: list[str], name: str, grad: bool) -> None:
    """The same numbers, of other tensors, as one call that is checked."""
    found, expected = [], []
    for _ in range(2):
        call = leaves(**ORDINARY[name])
        with torch.set_grad_enabled(grad):
            found.append(cce.loss(**call))
        with torch.set_grad_enabled(grad):
            fresh = {**call, "backend": "torch", "token_weight": torch.ones(N)}  # with a tensor, no kind is known
            expected.append(cce.loss(**fresh))
        for x in (found, expected):
            if grad:
                x[-1] = torch.autograd.grad(x[-1].sum(), (call["e"], call["c"]))
    torch.testing.assert_close(found, expected)
    assert len(checked) == 3


def test_what_a_kind_cannot_tell_is_checked_in_every_call(backend: Counting, checked: list[str]) -> None:
    for _ in range(2):
        with torch.autocast("cpu"):
            cce.loss(**leaves())
    for _ in range(2):
        cce.loss(**leaves(), token_weight=torch.ones(N))
    for _ in range(2):
        cce.loss(**leaves(), spec=cce.Spec(filter="element", vocab_order=list(range(V))))
    assert len(checked) == 6


class Counted:
    """Counts the calls of functions by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **functions: tuple[Any, str]) -> None:
        self.count = dict.fromkeys(functions, 0)
        for name, (owner, attribute) in functions.items():
            monkeypatch.setattr(owner, attribute, self._counting(name, getattr(owner, attribute)))

    def _counting(self, name: str, function: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count[name] += 1
            return function(*arguments, **options)

        return counted


@pytest.mark.parametrize("name", [*ORDINARY, "one pass"])
def test_one_decision_a_step(backend: Counting, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Forward, backward and `prepare` of the first step together decide once; of the next, not at all."""
    counted = Counted(
        monkeypatch, problem=(Problem, "of"), resolve=(decision, "resolve"), choose=(registry, "choose_name")
    )
    for expected in (1, 1):
        call = leaves(**ORDINARY.get(name, {}))
        cce.loss(**call).sum().backward()
        assert counted.count == dict.fromkeys(counted.count, expected)


@pytest.mark.parametrize("forgotten", [False, True])
def test_the_backward_keeps_the_forwards_backend(forgotten: bool) -> None:
    """Though another is registered, or none, under its name in between; and though many kinds of calls come between."""
    made: list[str] = []

    class Mine(TorchBackend):
        def backward(self, *arguments: Any) -> Any:
            made.append("mine")
            return super().backward(*arguments)

    cce.register_backend("mine", Mine)
    call = leaves(backend="mine", softcap=3.0)
    loss = cce.loss(**call)
    cce.unregister_backend("mine")
    if forgotten:
        decision._calls.clear()
    loss.backward()
    assert made == ["mine"]


def test_options_are_checked_before_a_backend_is_chosen() -> None:
    with pytest.raises(ValueError, match=r"^reduction: got 'sums'"):
        cce.loss(**leaves(reduction="sums", backend="torch", spec=cce.Spec(scratch_bytes=1)))


def test_one_pass_is_not_asked_about_no_rows_or_float16() -> None:
    asked: list[Problem] = []

    class Careful(TorchBackend):
        def one_pass(self, problem: Problem, spec: cce.Spec) -> Any:
            asked.append(problem)
            return super().one_pass(problem, spec)

    cce.register_backend("careful", Careful)
    try:
        e, c = torch.randn(3, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        cce.loss(e[:0], c, torch.zeros(0, dtype=torch.int64), backend="careful")
        cce.loss(e.half(), c.half(), torch.zeros(3, dtype=torch.int64), backend="careful")
        assert not asked
        cce.loss(e, c, torch.zeros(3, dtype=torch.int64), backend="careful")
        assert asked
    finally:
        cce.unregister_backend("careful")


def test_another_backend_of_the_name(backend: Counting) -> None:
    class Other(Counting):
        pass

    cce.loss(**leaves())
    cce.register_backend("counting", Other, replace=True)
    cce.loss(**leaves())
    found = registry.load("counting")
    assert backend.made == ["one pass"] and isinstance(found, Other) and found.made == ["one pass"]


def test_no_more_are_kept_than_some(backend: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "_MOST", 3)
    for n in range(1, 9):
        cce.loss(**leaves(e=torch.randn(n, D, requires_grad=True), targets=torch.zeros(n, dtype=torch.int64)))
        assert len(decision._known) <= 3 and len(decision._calls) <= 3


def test_compiled_code_and_transforms_do_without(backend: Counting, checked: list[str]) -> None:
    call = leaves()
    cce.loss(**call)
    torch.func.grad(lambda e: cce.loss(**{**call, "e": e}))(torch.randn(N, D))
    assert len(checked) == 2
