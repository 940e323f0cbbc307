"""Bad values of a recipe's tensors: named on a CPU, asserted where nothing may wait for them or see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cce import losses
from cce.losses import values

pytestmark = pytest.mark.usefixtures("one_thread")
T = torch.tensor([[0, 1, -100], [2, 3, 4]])
Q, P = torch.full((2, 3, 1), 0.5), -torch.ones(2, 3)

# Of each argument: a recipe of e (2, 3, 4), c (5, 4) and that argument, a good value and what to replace it by.
ARGUMENTS: dict[str, tuple[Callable[..., Tensor], Tensor, float]] = {
    "negatives": (lambda e, c, x: losses.unlikelihood(e, c, T, negatives=x), T[..., None], 5),
    "target_weight": (lambda e, c, x: losses.top_k_distillation(e, c, T[..., None], target_weight=x), Q, -1.0),
    "target_weight.sum": (
        lambda e, c, x: losses.top_k_distillation(e, c, T[..., None], target_weight=x, tail="bucket"),
        Q,
        1.5,
    ),
    "old_log_prob": (lambda e, c, x: losses.ppo(e, c, T, advantages=-P, old_log_prob=x), P, 2.0),
    "ref_log_prob": (
        lambda e, c, x: losses.ppo(e, c, T, advantages=-P, ref_log_prob=x, kl_coefficient=0.1),
        P,
        2.0,
    ),
    "logit_scale": (lambda e, c, x: losses.clip_contrastive(e[0], c[:3], logit_scale=x), torch.tensor(2.0), -1.0),
}
every_argument = pytest.mark.parametrize("name", ARGUMENTS)


def inputs() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, generator=rng), torch.randn(5, 4, generator=rng)


def bad_at(name: str, *where: int) -> Tensor:
    _, good, bad = ARGUMENTS[name]
    found = good.clone()
    found[where if good.ndim else ()] = bad
    return found


@every_argument
def test_named_with_its_value(name: str) -> None:
    f, _, bad = ARGUMENTS[name]
    with pytest.raises(ValueError, match=rf"^{name}.*: got {bad}.*expected"):
        f(*inputs(), bad_at(name, 1, 1))


@every_argument
def test_not_looked_at_where_ignored(name: str) -> None:
    f, good, _ = ARGUMENTS[name]
    if good.ndim:
        assert torch.equal(f(*inputs(), bad_at(name, 0, 2)), f(*inputs(), good))


@every_argument
def test_in_compiled_code(name: str) -> None:
    """An assertion in the graph, which has no break."""
    torch._dynamo.reset()
    f, good, _ = ARGUMENTS[name]
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs(), good.clone()), f(*inputs(), good))
    with pytest.raises((RuntimeError, ValueError), match=r"expected"):
        compiled(*inputs(), bad_at(name, 1, 1))


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name != "logit_scale"])
def test_of_all_samples_of_vmap(name: str) -> None:
    f, good, _ = ARGUMENTS[name]
    e, c = inputs()
    two = torch.stack([good, good])
    found = torch.vmap(lambda x: f(e, c, x))(two)
    torch.testing.assert_close(found, f(e, c, good).expand(2))
    with pytest.raises(ValueError, match=rf"^{name}"):
        torch.vmap(lambda x: f(e, c, x))(torch.stack([good, bad_at(name, 1, 1)]))


def test_without_values() -> None:
    """Of a meta or a fake tensor nothing is asked; a trace keeps the question."""
    values.check_positive("x", torch.empty(3, device="meta"))
    with FakeTensorMode():
        values.check_positive("x", torch.empty(3))

    def f(x: Tensor) -> Tensor:
        values.check_positive("x", x)
        return 2 * x

    traced = make_fx(f)(torch.ones(3))
    assert torch.equal(traced(torch.ones(3)), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="x: got an unexpected value"):
        traced(torch.zeros(3))


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An assertion, which a GPU makes by itself; with CCE_CHECK_TARGETS=1 the value is named there, too."""
    monkeypatch.setattr(Tensor, "device", property(lambda x: torch.device("cuda")))
    with pytest.raises(RuntimeError, match="x: got an unexpected value, expected"):
        values.check_positive("x", torch.zeros(3))
    monkeypatch.setenv("CCE_CHECK_TARGETS", "1")
    with pytest.raises(ValueError, match=r"x: got 0.0 at index \(0,\)"):
        values.check_positive("x", torch.zeros(3))


def test_nan_passes() -> None:
    """As what is computed of it is NaN; but a scale must be a number."""
    x: Any = torch.tensor([torch.nan])
    values.check_log_prob("x", x, torch.float32)
    values.check_probabilities("x", x, torch.float32, sum_at_most_one=True)
    with pytest.raises(ValueError, match=r"^x: got nan at index \(0,\), expected a finite number"):
        values.check_positive("x", x)
