"""The float64 definitions of ``cce.losses``: the formulae of its documentation, dense, differentiated by PyTorch.

``RECIPES`` has for each recipe: its own options (drawn by ``rng``), and its formula of ``(t, options, noise)``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from dense import Tokens, loss, reduce
from noise import Noise
from torch import Tensor
from torch.nn import functional as F

Formula = Callable[[Mapping[str, Tensor], Mapping[str, Any], Noise], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Recipe:
    """One function of ``cce.losses``.

    Attributes:
        formula: its values.
        draw: numbers of its own.
        needs: tensors of its own beside e, c and targets.
        token_weight: takes one.
        least: dimensions of ``targets`` at least.
    """

    formula: Formula
    draw: Callable[[random.Random], dict[str, Any]] = lambda rng: {}
    needs: tuple[str, ...] = ()
    token_weight: bool = False
    reductions: tuple[str, ...] = ("mean", "sum", "none")
    least: int = 0


def _reduced(
    noise: Noise, tokens: Tokens, t: Mapping[str, Tensor], options: Mapping[str, Any], values: Tensor
) -> tuple[Tensor]:
    """From one loss a row in use."""
    reduction, values = options.get("reduction", "mean"), noise.few(values)
    weight = tokens.of_rows(t["token_weight"]) if "token_weight" in t else None
    if reduction == "none":
        return (tokens.fill(values if weight is None else noise.few(values * noise.few(weight))),)
    return (reduce(noise, values, weight, reduction),)


def of_nll(f: Callable[..., Tensor]) -> Formula:
    """The formula of a loss that is ``f(nll, noise, options)`` of every token."""

    def formula(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
        tokens = Tokens(t, options, noise)
        return _reduced(noise, tokens, t, options, f(tokens.nll(), noise, options))

    return formula


def _log_rest(nll: Tensor) -> Tensor:
    """log(1 - p); a finite number at p = 1, where every loss below has a finite limit."""
    small, large = torch.where(nll < 0.7, nll, 1.0), torch.where(nll < 0.1, 1.0, nll)
    small = torch.where(small < 1e-300, 1e-300, small)
    return torch.where(nll < 0.7, torch.log(-torch.expm1(-small)), torch.log1p(-torch.exp(-large)))


def _power(x: Tensor, power: float) -> Tensor:
    """exp(power x), also of power 0."""
    return torch.exp(power * x) if power else torch.ones_like(x)


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1; PyTorch differentiates expm1 as its result + 1, which cancels far below 0."""
    return torch.where(x.abs() < 0.5, torch.expm1(x), torch.exp(x) - 1)


def focal(nll: Tensor, noise: Noise, o: Mapping[str, Any]) -> Tensor:
    masked = torch.isposinf(nll)  # a factor of 1, whose derivative would be 0 * inf
    finite = torch.where(masked, 1, nll)
    return torch.where(masked, nll, _power(_log_rest(finite), o.get("gamma", 2.0)) * finite)


def comp_sum(nll: Tensor, noise: Noise, o: Mapping[str, Any]) -> Tensor:
    power = 1 - o["tau"]
    return _expm1(power * nll) / power if power else nll


def generalized(nll: Tensor, noise: Noise, o: Mapping[str, Any]) -> Tensor:
    q = o.get("q", 0.7)
    return -_expm1(-q * nll) / q


def dice(nll: Tensor, noise: Noise, o: Mapping[str, Any]) -> Tensor:
    alpha, gamma = o.get("alpha", 1.0), o.get("gamma", 1.0)
    w = _power(_log_rest(nll), alpha) * torch.exp(-nll)
    return noise.by(1 - (2 * w + gamma) / (w + 1 + gamma), 4 * noise.u)


def ldr(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    lam, margin = options.get("lam", 1.0), options.get("margin", 0.0)
    tokens = Tokens(t, _tempered(options, lam), noise)
    nll = tokens.nll()
    # sum_k exp((z_k - z_y + margin [k != y]) / lam) is 1 for k = y and exp(margin / lam) (1 / p - 1) for the others.
    value = nll + torch.log1p(math.expm1(margin / lam) * -torch.expm1(-nll)) - math.log(len(t["c"]))
    value = noise.by(value, 4 * noise.u * (math.log(len(t["c"]) + 1) + value.detach().abs()))
    return _reduced(noise, tokens, t, options, lam * value)


def z_loss(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    tokens = Tokens(t, options, noise)
    return _reduced(noise, tokens, t, options, options.get("coefficient", 1e-4) * tokens.lse().square())


def _least(noise: Noise) -> float:
    """2^7 epsilon of the results' dtype: what 1 - p counts as at least under a logarithm."""
    return 2**7 * torch.finfo(noise.results).eps


def _with_slope(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    finite = torch.where(torch.isinf(x), 0, x)
    return value.detach() + slope.detach() * (finite - finite.detach())


def unlikelihood(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    alpha, likelihood = options.get("alpha", 1.0), options.get("likelihood", True)
    every = t["negatives"] != options.get("ignore_index", -100)
    for k in range(every.shape[-1]):  # a set
        same = t["negatives"][..., :k] == t["negatives"][..., k : k + 1]
        every[..., k] &= ~(same & every[..., :k]).any(-1)
    if likelihood:
        every &= t["negatives"] != t["targets"][..., None]
    # A token without entries has no logits, whatever its e and the bias are.
    tokens = Tokens(t, options, noise, None if likelihood else every.any(-1))
    negatives, counts = tokens.of_rows(t["negatives"]), tokens.of_rows(every)
    nll = tokens.each(negatives.masked_fill(~counts, 0))
    rest = (-torch.expm1(-nll)).clamp(min=_least(noise))
    value = torch.where(nll > 0.7, torch.log1p(-torch.exp(-nll)), rest.log())
    of_negatives = torch.where(counts, noise.few(_with_slope(nll, value, torch.exp(-nll) / rest)), 0)
    found = noise.sum(-alpha * of_negatives)
    return _reduced(noise, tokens, t, options, tokens.nll() + found if likelihood else found)


def top_k_distillation(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    temperature, tail = options.get("temperature", 1.0), options.get("tail", "drop")
    tokens = Tokens(t, _tempered(options, temperature), noise)
    q = noise.few(tokens.of_rows(t["target_weight"]).masked_fill(~tokens.valid, 0))
    if tail == "renormalize":
        total = q.sum(-1, keepdim=True)
        q = noise.few(q / torch.where(total == 0, 1, total))
    nll = tokens.each()
    value = noise.sum(noise.few(torch.xlogy(q, q)) + noise.few(q * nll.masked_fill(q == 0, 0)))
    if tail == "bucket":
        rest = noise.by(1 - q.sum(-1), 8 * noise.u).clamp(min=0)
        mass = noise.sum(torch.exp(-nll).masked_fill(~tokens.valid, 0))
        of_student = (1 - mass).clamp(min=_least(noise))
        log = _with_slope(mass, of_student.log(), -1 / of_student)
        value = noise.few(value + noise.few(torch.xlogy(rest, rest)) - noise.few(rest * log))
    return _reduced(noise, tokens, t, options, temperature**2 * value)


def _tempered(options: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """Logits over ``temperature``: softcap tanh(s x / softcap) / t = (softcap / t) tanh((s / t) x / (softcap / t))."""
    found = {**options, "logit_scale": options.get("logit_scale", 1.0) / temperature}
    if options.get("softcap") is not None:
        found["softcap"] = options["softcap"] / temperature
    return found


def multi_token(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    heads, shift = len(t["e"]), options.get("shift", 1)
    length, reduction = t["targets"].shape[-1], options.get("reduction", "mean")
    weight = t["head_weight"] if "head_weight" in t else torch.ones(heads, dtype=torch.float64)
    found = []
    for h in range(heads):
        tokens = Tokens({**t, "e": t["e"][h]}, {**options, "shift": shift + h}, noise)
        if reduction == "none":
            values = noise.few(weight[h] * tokens.fill(tokens.nll()))
            found.append(F.pad(values, (0, length - values.shape[-1])))
        else:
            count = max(len(tokens.rows), 1) if reduction == "mean" else 1
            found.append(noise.few(weight[h] * noise.sum(tokens.nll()) / count))
    return (torch.stack(found) if reduction == "none" else noise.sum(torch.stack(found)),)


def multi_codebook(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    q, reduction = len(t["c"]), options.get("reduction", "mean")
    shared = t["e"].ndim == t["targets"].ndim
    losses = []
    for i in range(q):
        e = t["e"] if shared else t["e"].select(-2, i)
        losses += loss({"e": e, "c": t["c"][i], "targets": t["targets"][..., i]}, options, noise)
    found = torch.stack(losses, -1)
    return (found if reduction == "none" else noise.sum(found) / (q if reduction == "mean" else 1),)


def _one_of(**choices: list[Any]) -> Callable[[random.Random], dict[str, Any]]:
    """Draws each number from its list."""
    return lambda rng: {name: rng.choice(values) for name, values in choices.items()}


def _ldr_numbers(rng: random.Random) -> dict[str, Any]:
    lam = rng.choice([0.25, 1, 3.0])
    return {"lam": lam, "margin": lam * rng.choice([0, 0.3, 2, 10])}


RECIPES: dict[str, Recipe] = {
    "focal": Recipe(of_nll(focal), _one_of(gamma=[0, 0.5, 1, 2.0, 5]), token_weight=True),
    "comp_sum": Recipe(of_nll(comp_sum), _one_of(tau=[0, 0.5, 1, 1.0, 1.7, 2, 3.5]), token_weight=True),
    "generalized_cross_entropy": Recipe(of_nll(generalized), _one_of(q=[1e-3, 0.7, 1]), token_weight=True),
    "dice": Recipe(of_nll(dice), _one_of(alpha=[0, 0.5, 1, 2.0], gamma=[0, 1, 3.0]), token_weight=True),
    "ldr": Recipe(ldr, _ldr_numbers, token_weight=True),
    "z_loss": Recipe(z_loss, _one_of(coefficient=[1e-4, 1, -2.0]), token_weight=True),
    "unlikelihood": Recipe(
        unlikelihood, _one_of(alpha=[0.5, 1.0, 3], likelihood=[True, True, False]), ("negatives",), token_weight=True
    ),
    "top_k_distillation": Recipe(
        top_k_distillation,
        _one_of(temperature=[1.0, 0.5, 3], tail=["drop", "renormalize", "bucket"]),
        ("target_weight",),
        token_weight=True,
    ),
    "multi_token": Recipe(multi_token, needs=("head_weight",), least=1),
    "multi_codebook": Recipe(multi_codebook, least=1),
}
