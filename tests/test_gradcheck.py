"""Gradients by finite differences in float64: every option of ``cce.terms`` and ``cce.loss``, over several tiles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import cce

pytestmark = pytest.mark.usefixtures("one_thread")
M, D, V, K = 6, 2, 7, 3
ACCUMULATIONS = ("tile", "online")
DIFFERENTIABLE = ("nll", "lse", "entropy")

TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": 0.6},
    "shift": {"shift": 1},
    "ignore_index": {"ignored": True},
    "target_weight": {"soft": True},
    "frozen-c": {"frozen": ("c",)},
    "frozen-e": {"frozen": ("e",), "bias": True},
    "only-target-weight": {"frozen": ("e", "c"), "soft": True},
    "all": {"bias": True, "softcap": 2.0, "logit_scale": 1.3, "shift": 2, "ignored": True, "soft": True},
    "all-but-softcap": {"bias": True, "logit_scale": 1.3, "shift": 2, "ignored": True, "soft": True},
}
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(DIFFERENTIABLE, size)]

LOSS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "only-smoothing": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 0.05},
    "weight": {"weight": True},
    "weight-smoothing": {"weight": True, "label_smoothing": 0.3},
    "token_weight": {"token_weight": True},
    "token_weight-weight": {"token_weight": True, "weight": True},
    "soft": {"soft": True, "token_weight": True, "label_smoothing": 0.2},
    "all": {"bias": True, "logit_scale": 1.2, "label_smoothing": 0.2, "z_loss": 0.05, "weight": True}
    | {"token_weight": True, "soft": True, "shift": 1, "ignored": True},
}
LOSS["all-sum"] = {**LOSS["all"], "reduction": "sum"}
LOSS["all-none"] = {**LOSS["all"], "reduction": "none"}


def spec(lse_accumulation: str) -> cce.Spec:
    return cce.Spec(filter="none", lse_accumulation=lse_accumulation, block_n=2, block_v=3)


class Call:
    """A call of ``cce.terms`` or ``cce.loss`` as a function of those of its tensors that may have a gradient."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = dict(options)
        rng = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        lead = (2, M // 2)
        soft, bias = self.options.pop("soft", False), self.options.pop("bias", False)
        frozen = self.options.pop("frozen", ())
        self.targets = torch.randint(V, (*lead, K) if soft else lead, generator=rng)
        if self.options.pop("ignored", False):
            self.targets.view(M, -1)[2] = -100
            self.targets.view(-1)[-1] = -100
        self.tensors: dict[str, Tensor] = {"e": draw(*lead, D), "c": draw(V, D)}
        if bias:
            self.tensors["bias"] = draw(V)
        if soft:
            self.tensors["target_weight"] = draw(*lead, K).abs()
        if self.options.pop("token_weight", False):
            self.tensors["token_weight"] = draw(*lead).abs() + 0.1
        if self.options.pop("weight", False):
            self.options["weight"] = draw(V).abs()
        for name, x in self.tensors.items():
            x.requires_grad_(name not in frozen)

    def terms(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = cce.terms(targets=self.targets, **dict(zip(self.tensors, tensors, strict=True)), **self.options)
        return tuple(x for x in found if x is not None)

    def loss(self, *tensors: Tensor) -> Tensor:
        return cce.loss(targets=self.targets, **dict(zip(self.tensors, tensors, strict=True)), **self.options)


@pytest.mark.parametrize("lse_accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("options", TERMS.values(), ids=TERMS)
def test_terms(options: dict[str, Any], lse_accumulation: str) -> None:
    call = Call({**options, "outputs": DIFFERENTIABLE, "spec": spec(lse_accumulation)})
    assert gradcheck(call.terms, tuple(call.tensors.values()))


@pytest.mark.parametrize("lse_accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["", "softcap"])
@pytest.mark.parametrize("outputs", SUBSETS, ids="-".join)
def test_outputs(outputs: tuple[str, ...], softcap: float | None, lse_accumulation: str) -> None:
    """Each subset of the outputs, the prediction beside it, which has no gradient and must not disturb theirs."""
    call = Call({"bias": True, "softcap": softcap, "outputs": (*outputs, "prediction"), "spec": spec(lse_accumulation)})
    found = call.terms(*call.tensors.values())
    assert [x.requires_grad for x in found] == [True] * len(outputs) + [False]
    assert gradcheck(lambda *tensors: call.terms(*tensors)[:-1], tuple(call.tensors.values()))


@pytest.mark.parametrize("lse_accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["", "softcap"])
@pytest.mark.parametrize("options", LOSS.values(), ids=LOSS)
def test_loss(options: dict[str, Any], softcap: float | None, lse_accumulation: str) -> None:
    call = Call({**options, "softcap": softcap, "spec": spec(lse_accumulation)})
    assert gradcheck(call.loss, tuple(call.tensors.values()))


@pytest.mark.parametrize("filter", ["element", "tile"])
@pytest.mark.parametrize("options", [LOSS["plain"], LOSS["all"]], ids=["plain", "all"])
def test_filter_that_skips_nothing(options: dict[str, Any], filter: str) -> None:
    """The gathered arithmetic of live tiles is exact where all tiles are live."""
    everything = cce.Spec(filter=filter, threshold=1e-30, block_n=2, block_v=3)
    call = Call({**options, "spec": everything})
    assert gradcheck(call.loss, tuple(call.tensors.values()))
