"""Policy gradients against loops over the tokens of dense log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import cce
from cce import losses

OWN: dict[str, dict[str, Any]] = {
    "clipped": {"clip": 0.1},
    "clip-higher": {"clip": 0.05, "clip_high": 0.5},
    "entropy": {"entropy_coefficient": 0.3},
    "high-entropy": {"top_entropy": 0.4, "clip": 0.3},
    "kl": {"kl_coefficient": 0.2},
    "all": {"clip": 0.2, "clip_high": 0.28, "entropy_coefficient": 0.1, "top_entropy": 0.5, "kl_coefficient": 0.3},
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(problem: Any) -> dict[str, Tensor]:
    """Near the policy's own log-probabilities, so that some ratios are clipped; not a number where ignored."""
    log_p = problem.p().log().detach()
    missing = ~problem.in_use
    return {
        "advantages": draw(*log_p.shape, seed=1).masked_fill(missing, torch.nan).requires_grad_(),
        "old_log_prob": (log_p + 0.4 * draw(*log_p.shape, seed=12)).clamp(max=0).masked_fill(missing, torch.nan),
        "ref_log_prob": (log_p + draw(*log_p.shape, seed=3)).clamp(max=0).masked_fill(missing, torch.inf),
    }


def dense(problem: Any, given: dict[str, Tensor], own: dict[str, Any]) -> Tensor:
    p = problem.logits().softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    in_use = problem.in_use
    ranked = sorted((float(h) for h in entropy[in_use].detach()), reverse=True)
    threshold = ranked[math.ceil(own.get("top_entropy", 1) * len(ranked) - 1e-9) - 1]
    low, high = 1 - own.get("clip", 0.2), 1 + own.get("clip_high", own.get("clip", 0.2))
    rows = []
    for at in in_use.flatten().nonzero()[:, 0]:
        log_p, a, h = (x.flatten()[at] for x in (problem.p().log(), given["advantages"], entropy))
        ratio = (log_p - given["old_log_prob"].flatten()[at]).exp()
        value = -min(ratio * a, ratio.clamp(low, high) * a) if h >= threshold else 0 * a
        value = value - own.get("entropy_coefficient", 0) * h
        if "kl_coefficient" in own:
            d = given["ref_log_prob"].flatten()[at] - log_p
            value = value + own["kl_coefficient"] * (d.exp() - d - 1)
        rows.append(value)
    return torch.zeros(in_use.shape, dtype=p.dtype).masked_scatter(in_use, torch.stack(rows))


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_ppo(own: dict[str, Any], problem: Any, same: Any) -> None:
    given = inputs_of(problem)
    if "kl_coefficient" not in own:
        del given["ref_log_prob"]
    found = losses.ppo(problem.e, problem.c, problem.targets, reduction="none", **given, **own, **problem.call)
    same(found, dense(problem, given, own), [*problem.inputs, given["advantages"]])


def test_the_data_are_clipped_on_both_sides(problem: Any) -> None:
    """Or the test above would not see whether they are."""
    given = inputs_of(problem)
    ratio = (problem.p().log() - given["old_log_prob"]).exp()[problem.in_use]
    a = given["advantages"][problem.in_use]
    assert ((ratio > 1.1) & (a > 0)).any() and ((ratio < 0.9) & (a < 0)).any()
    assert ((ratio > 1.1) & (a < 0)).any() or ((ratio < 0.9) & (a > 0)).any()


def test_one_update_a_sample_is_the_policy_gradient(problem: Any, same: Any) -> None:
    a = draw(*problem.labels.shape, seed=1)
    found = losses.ppo(problem.e, problem.c, problem.targets, advantages=a, reduction="sum", **problem.call)
    log_p = (problem.p().log() * a)[problem.in_use].sum()
    for x, y in zip(
        torch.autograd.grad(found, problem.inputs), torch.autograd.grad(-log_p, problem.inputs), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "token_weight"])
def test_mean_of_sequences(weighted: bool, problem: Any, same: Any) -> None:
    """One of them has no token in use, and does not count."""
    targets = problem.targets.clone()
    targets[2] = problem.ignore_index
    weight = problem.token_weight() if weighted else None
    given = {"advantages": draw(3, seed=4).requires_grad_(), "old_log_prob": inputs_of(problem)["old_log_prob"]}
    found = losses.ppo(
        problem.e, problem.c, targets, reduction="sequence", token_weight=weight, **given, **problem.call
    )
    log_p = problem.p().log()
    of_sequences = []
    for b in range(2):
        use = problem.in_use[b]
        w = (torch.ones_like(log_p) if weight is None else weight[:, problem.shift :])[b][use]
        ratio = (log_p[b] - given["old_log_prob"][b])[use].exp()
        a = given["advantages"][b]
        of_sequences.append((w * -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)).sum() / w.sum())
    inputs = [*problem.inputs, given["advantages"], *([weight] if weighted else [])]
    same(found, (of_sequences[0] + of_sequences[1]) / 2, inputs)


def test_grpo(problem: Any, same: Any) -> None:
    """Of a group of three: advantages are rewards less their mean over their standard deviation."""
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    old = inputs_of(problem)["old_log_prob"].nan_to_num()
    found = losses.grpo(
        problem.e, problem.c, problem.targets, rewards=rewards, group_size=3, old_log_prob=old, **problem.call
    )
    a = ((rewards - 0.5) / (0.5 + 1e-6))[:, None]
    ratio = (problem.p().log() - old).exp().masked_fill(~problem.in_use, 1)
    each = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * problem.in_use
    same(found, (each.sum(1) / problem.in_use.sum(1)).mean(), problem.inputs)


def test_group_advantages() -> None:
    rewards = draw(6, seed=5)
    found = losses.group_advantages(rewards, group_size=3)
    for group, mine in zip(rewards.split(3), found.split(3), strict=True):
        mean = sum(group) / 3
        std = math.sqrt(sum((x - mean) ** 2 for x in group) / 2)
        torch.testing.assert_close(mine, (group - mean) / (std + 1e-6))
    assert torch.equal(losses.group_advantages(torch.ones(4), group_size=2), torch.zeros(4))


E, C, T, A = torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)
BAD: list[tuple[str, Any, dict[str, Any]]] = [
    ("advantages", torch.ones(3), {}),
    ("advantages", 1.0, {}),
    ("advantages", torch.ones(2, 3, dtype=torch.int64), {}),
    ("old_log_prob", torch.ones(2), {}),
    ("ref_log_prob", torch.ones(2), {"kl_coefficient": 0.1}),
    ("ref_log_prob", None, {"kl_coefficient": 0.1}),
    ("kl_coefficient", 0, {"ref_log_prob": -A}),
    ("kl_coefficient", -1, {}),
    ("clip", -0.1, {}),
    ("clip_high", "0.2", {}),
    ("top_entropy", 0, {}),
    ("top_entropy", 1.1, {}),
    ("entropy_coefficient", math.nan, {}),
    ("reduction", "batch", {}),
    ("old_log_prob", 5 * A, {}),
    ("ref_log_prob", 5 * A, {"kl_coefficient": 0.1}),
]


@pytest.mark.parametrize(("name", "value", "others"), BAD)
def test_bad_input(name: str, value: Any, others: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected"):
        losses.ppo(E, C, T, **{"advantages": A, **others, name: value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rewards", {"rewards": torch.ones(3)}),
        ("rewards", {"rewards": torch.ones(2, 2)}),
        ("rewards", {"rewards": [1.0, 0.0]}),
        ("group_size", {"group_size": 0}),
        ("group_size", {"group_size": 1}),
        ("advantages", {"advantages": A}),
    ],
)
def test_bad_groups(name: str, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected"):
        losses.grpo(E, C, T, **{"rewards": torch.ones(2), "group_size": 2, **options})


@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_a_ratio_that_overflows_where_it_does_not_count(advantage: float) -> None:
    """Clipped, or times an advantage of 0: a finite loss without a gradient."""
    e = torch.eye(4).mul(50).view(1, 4, 4).requires_grad_()
    old = torch.tensor([[-200.0, -1e30, -90.0, -torch.inf]])
    found = losses.ppo(
        e, torch.eye(4), torch.arange(4)[None], advantages=torch.full((1, 4), advantage), old_log_prob=old
    )
    torch.testing.assert_close(found.detach(), torch.tensor(-1.2 * advantage))
    assert (torch.autograd.grad(found, e)[0] == 0).all()


def test_log_probabilities_may_exceed_0_by_rounding() -> None:
    for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 0.03)):
        old = torch.full((2, 3), error, dtype=dtype)
        assert losses.ppo(E, C, T, advantages=A, old_log_prob=old).isfinite()


def test_entropy_of_a_filtered_spec() -> None:
    """Its rank needs no gradient; its gradient is refused."""
    spec = cce.Spec(filter="element", threshold=1e-9)
    e = E.clone().requires_grad_()
    given: dict[str, Any] = {"advantages": A, "top_entropy": 0.5}
    found, exact = (losses.ppo(e, C, T, spec=s, **given) for s in (spec, None))
    torch.testing.assert_close(found, exact)
    with pytest.raises(ValueError, match=r"^spec: got filter='element'"):
        losses.ppo(e, C, T, spec=spec, entropy_coefficient=0.1, **given)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_nan_reward_of_a_sample_without_tokens(shift: int) -> None:
    """It is left out of its group; that of a sample with tokens is seen, in its group only."""
    e = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = T.repeat(2, 1).clone()
    targets[1, shift:] = -100
    rewards = torch.tensor([1.0, torch.nan, 3.0, 1.0])
    given: dict[str, Any] = {"group_size": 2, "reduction": "none", "shift": shift}
    found = losses.grpo(e, C, targets, rewards=rewards, **given)
    other = losses.grpo(e, C, targets, rewards=torch.tensor([1.0, 1.0, 3.0, 1.0]), **given)
    assert torch.equal(found, other) and (found[0] == 0).all() and (found[2] != 0).all()
    for g in torch.autograd.grad(found.sum(), e):
        assert g.isfinite().all()
    targets[1, shift] = 2
    seen = losses.grpo(e, C, targets, rewards=rewards, **given)
    assert seen[0].isnan().all() and seen[1, 0].isnan() and torch.equal(seen[2:], found[2:])


def test_a_missing_reward_is_no_member_of_its_group() -> None:
    """Mean and deviation are those of the two others."""
    e, targets = torch.randn(3, 3, 4), T[:1].repeat(3, 1).clone()
    targets[1] = -100
    found = losses.grpo(e, C, targets, rewards=torch.tensor([1.0, torch.nan, 0.0]), group_size=3)
    two = losses.grpo(e[[0, 2]], C, targets[[0, 2]], rewards=torch.tensor([1.0, 0.0]), group_size=2)
    torch.testing.assert_close(found, two)


def test_rewards_of_16_bits() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 1.0])
    for dtype in (torch.bfloat16, torch.float16):
        found = losses.group_advantages(rewards.to(dtype), group_size=4)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, losses.group_advantages(rewards, group_size=4))


def test_equal_rewards_have_no_gradient_that_is_nan() -> None:
    rewards = torch.ones(4, requires_grad=True)
    (g,) = torch.autograd.grad(losses.group_advantages(rewards, group_size=2).square().sum(), rewards)
    assert (g == 0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens_at_all(shape: tuple[int, ...]) -> None:
    given: dict[str, Any] = {"advantages": torch.ones(shape), "top_entropy": 0.5, "entropy_coefficient": 0.1}
    targets = torch.zeros(shape, dtype=torch.int64)
    assert losses.ppo(torch.ones(*shape, 4), C, targets, reduction="sum", **given) == 0
    assert losses.ppo(torch.ones(*shape, 4), C, targets, **given).isnan()


def test_a_sequence_without_weight_has_no_gradient() -> None:
    """It is left out of the mean over the sequences: its weights, too, have no influence there."""
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 0.5]], requires_grad=True)
    found = losses.ppo(E, C, T, advantages=A, token_weight=weight, reduction="sequence")
    other = losses.ppo(E[1:], C, T[1:], advantages=A[1:], token_weight=weight[1:], reduction="sequence")
    g, expected = (torch.autograd.grad(x, weight)[0] for x in (found, other))
    assert found == other and torch.equal(g, expected)
