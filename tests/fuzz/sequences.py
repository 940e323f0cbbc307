"""The float64 definitions of the recipes of sequences, policies and pairs."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from dense import Tokens, reduce
from noise import Noise, normalized
from recipes import RECIPES, Recipe, _reduced
from torch import Tensor
from torch.nn import functional as F


def _log_prob(tokens: Tokens, noise: Noise) -> Tensor:
    """(...) of each sequence."""
    return -noise.sum(tokens.fill(tokens.nll()))


def _of_sequences(noise: Noise, values: Tensor, in_use: Tensor, reduction: str) -> tuple[Tensor]:
    values = torch.where(in_use, values, 0)
    return (values,) if reduction == "none" else (reduce(noise, values[in_use], None, reduction),)


def sequence_log_prob(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    return (_log_prob(Tokens(t, options, noise), noise),)


def pass_at_n(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    tokens, n = Tokens(t, options, noise), options["n"]
    nll = -_log_prob(tokens, noise)
    if n > 1:
        # log p + log n is the limit where p is so small that 1 - p is 1; the other branch must not meet it.
        far = nll > 36 + math.log(n)
        near = torch.where(far, 1.0, nll)
        near = torch.where(near < 1e-300, 1e-300, near)
        miss = n * torch.where(near < 0.7, torch.log(-torch.expm1(-near)), torch.log1p(-torch.exp(-near)))
        nll = torch.where(far, nll - math.log(n), _minus_log(torch.where(miss > -1e-300, -1e-300, miss)))
    return _of_sequences(noise, noise.few(nll), tokens.in_use.any(-1), options.get("reduction", "mean"))


def _minus_log(miss: Tensor) -> Tensor:
    """- log(1 - exp(miss))."""
    small = torch.where(miss < -0.7, -1.0, miss)
    return -torch.where(
        miss < -0.7, torch.log1p(-torch.exp(torch.where(miss > -0.1, -1.0, miss))), torch.log(-torch.expm1(small))
    )


def dpo(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    tokens, beta, eps = Tokens(t, options, noise), options.get("beta", 0.1), options.get("label_smoothing", 0.0)
    ahead = noise.few(_log_prob(tokens, noise) - noise.few(t["ref_log_prob"]))
    chosen, rejected = ahead.chunk(2)
    h = beta * noise.few(chosen - rejected)
    value = noise.few(-(1 - eps) * F.logsigmoid(h))
    if eps:
        value = value - noise.few(eps * F.logsigmoid(-h))
    first, second = tokens.in_use.any(-1).chunk(2)
    return _of_sequences(noise, value, first | second, options.get("reduction", "mean"))


def ppo(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    tokens = Tokens(t, options, noise)
    log_prob = -tokens.nll()

    def beside(x: Tensor) -> Tensor:
        x = x[..., None].expand(tokens.shape) if x.shape != tokens.shape else x
        return noise.few(x.reshape(-1)[tokens.rows])

    a = beside(t["advantages"] if "advantages" in t else _advantages(noise, t["rewards"], options["group_size"]))
    old = beside(t["old_log_prob"]) if "old_log_prob" in t else log_prob.detach()
    ratio = noise.few(torch.exp(noise.few(log_prob - old) if "old_log_prob" in t else log_prob - old))
    clip = options.get("clip", 0.2)
    high = clip if options.get("clip_high") is None else options["clip_high"]
    value = -torch.minimum(noise.few(ratio * a), noise.few(ratio.clamp(1 - clip, 1 + high) * a))
    share = options.get("top_entropy", 1.0)
    if share < 1 and len(value):
        entropy = tokens.entropy().detach()
        least = entropy.sort(descending=True).values[math.ceil(round(share * len(value), 6)) - 1]
        among = (entropy >= least) | entropy.isnan()
        if noise.generator is not None:  # which of those with as good as the same entropy counts is left to rounding
            near = (entropy - least).abs() <= 64 * noise.u * (1 + least.abs())
            among = torch.where(near, noise.signs(entropy) > 0, among)
        value = torch.where(among, value, 0)
    if options.get("entropy_coefficient", 0.0):
        value = noise.few(value - options["entropy_coefficient"] * tokens.entropy())
    if "ref_log_prob" in t:
        d = noise.few(beside(t["ref_log_prob"]) - log_prob)
        value = noise.few(value + options["kl_coefficient"] * noise.few(noise.few(torch.expm1(d)) - d))
    if options["reduction"] != "sequence":
        return _reduced(noise, tokens, t, options, value)
    weight = tokens.of_rows(t["token_weight"]) if "token_weight" in t else torch.ones_like(value)
    of_row = tokens.fill(weight).sum(-1)
    used = of_row != 0
    means = noise.sum(tokens.fill(noise.few(value * weight)))[used] / noise.few(of_row[used])
    return (noise.sum(means.reshape(-1)) / (torch.nan if not used.any() else int(used.sum())),)


def _advantages(noise: Noise, rewards: Tensor, size: int) -> Tensor:
    """(B,) (reward - mean) / (standard deviation of a sample + 1e-6) of each group."""
    groups = noise.few(rewards).view(-1, size)
    centred = noise.by(groups - groups.mean(1, keepdim=True), 4 * noise.u * groups.abs().amax(1, keepdim=True))
    return (centred / (noise.few(centred.square().sum(1, keepdim=True) / (size - 1)).sqrt() + 1e-6)).view(-1)


def evaluate(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    """The summed nll, its mean and perplexity; what is correct is checked as a prediction."""
    tokens = Tokens(t, options, noise)
    total, count = noise.sum(tokens.nll()), len(tokens.rows)
    return total, total / count, (total / count).exp()


def clip_contrastive(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    a, b = _embeddings(t, options, noise)
    scale = (
        t["logit_scale"] if "logit_scale" in t else torch.tensor(options.get("logit_scale", 1 / 0.07), dtype=a.dtype)
    )
    targets = torch.arange(len(a))
    both = [
        Tokens({"e": _stored(noise, x * scale, name), "c": y, "targets": targets}, {}, noise).nll()
        for x, y, name in ((a, b, "e"), (b, a, "c"))
    ]
    return _of_pairs(noise, noise.few((both[0] + both[1]) / 2), options)


def nt_xent(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    temperature = options.get("temperature", 0.5)
    t = {"e": t["e"], "c": _stored(noise, t["c"], "e")}  # both are of e's dtype
    x = torch.cat(_embeddings(t, options, noise))
    z = noise.product(x, x) / temperature
    size = (x.abs() @ x.abs().T).detach() / temperature * noise.u * (2 * math.sqrt(x.shape[1]) + 8)
    itself = torch.eye(len(x), dtype=torch.bool)
    z = noise.by(z, size).masked_fill(itself, -torch.inf)
    other = torch.arange(len(x)).roll(len(x) // 2)
    found = -noise.log_softmax(z, size).gather(1, other[:, None])[:, 0]
    return _of_pairs(noise, noise.few(noise.nll(found, len(x))), options)


def _embeddings(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, Tensor]:
    """e and c, of norm 1 if asked for, in e's dtype."""
    if not options.get("normalize", True):
        return t["e"], t["c"]
    return _stored(noise, normalized(t["e"], "e", noise), "e"), _stored(noise, normalized(t["c"], "c", noise), "c")


def _stored(noise: Noise, x: Tensor, like: str) -> Tensor:
    """Rounded to the dtype of e or c, its gradient too."""
    unit = noise.stored[like]
    x = noise.on_gradient(x, lambda g: noise.by(g, unit * g.abs()))
    # Numbers that are multiples of each other by powers of two are rounded alike.
    common = unit * x.detach() * noise.signs(x, 1) if noise.generator is not None else 0
    return noise.by(x + common, (unit + 4 * noise.own[like]) * x.detach().abs())


def _of_pairs(noise: Noise, values: Tensor, options: Mapping[str, Any]) -> tuple[Tensor]:
    reduction = options.get("reduction", "mean")
    return (values,) if reduction == "none" else (reduce(noise, values, None, reduction),)


def _ppo_numbers(rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"clip": rng.choice([0, 0.2, 0.5])}
    if rng.random() < 0.3:
        found["clip_high"] = 0.28
    if rng.random() < 0.2:
        found["top_entropy"] = rng.choice([0.2, 0.5, 1])
    if rng.random() < 0.3:
        found["entropy_coefficient"] = rng.choice([0.01, -1.0])
    return found


RECIPES.update(
    {
        "sequence_log_prob": Recipe(sequence_log_prob, reductions=(), least=1),
        "pass_at_n": Recipe(pass_at_n, lambda rng: {"n": rng.choice([1, 2, 4, 256, 10**6])}, least=1),
        "dpo": Recipe(
            dpo,
            lambda rng: {"beta": rng.choice([0.1, 1, 5.0]), "label_smoothing": rng.choice([0.0, 0.1])},
            ("ref_log_prob",),
            least=2,
        ),
        "ppo": Recipe(
            ppo,
            _ppo_numbers,
            ("advantages", "old_log_prob", "ref_log_prob"),
            token_weight=True,
            reductions=("mean", "sum", "none", "sequence"),
            least=1,
        ),
        "grpo": Recipe(
            ppo,
            lambda rng: {**_ppo_numbers(rng), "group_size": 2},
            ("rewards", "old_log_prob", "ref_log_prob"),
            token_weight=True,
            reductions=("mean", "sum", "none", "sequence"),
            least=2,
        ),
        "evaluate": Recipe(evaluate, reductions=()),
        "clip_contrastive": Recipe(
            clip_contrastive,
            lambda rng: {"logit_scale": rng.choice([1, 1 / 0.07, 100.0]), "normalize": rng.random() < 0.5},
            ("logit_scale",),
        ),
        "nt_xent": Recipe(
            nt_xent, lambda rng: {"temperature": rng.choice([0.05, 0.5, 2]), "normalize": rng.random() < 0.5}
        ),
    }
)
