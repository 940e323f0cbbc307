"""The recipes' formulas on dense float64 logits (N, V), and problems at their edges.

1 - p is a sum over the other entries, so that nothing is lost where p is near 1. What ``cce.losses`` documents beside
the formula is in it: 1 - p counts as at least 2^7 epsilon under a logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cce import losses

STYLES = ("random", "equal", "zero", "peaked", "offset", "huge", "masked")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Edge:
    """A problem of N tokens; some are ignored. e (N, D), c (V, D), bias (V,) or None in one dtype, targets (N,)."""

    e: Tensor
    c: Tensor
    bias: Tensor | None
    targets: Tensor

    @classmethod
    def of(cls, style: str, dtype: torch.dtype, n: int, v: int, d: int, ignored: str, seed: int) -> Edge:
        rng = torch.Generator().manual_seed(seed)
        e, c = torch.randn(n, d, generator=rng), torch.randn(v, d, generator=rng)
        if style in ("peaked", "masked"):
            e *= 40
        elif style == "equal":
            e, c = e.round(), torch.ones_like(c)
        elif style == "zero":
            e, c = torch.zeros_like(e), torch.zeros_like(c)
        elif style == "huge":
            e, c = (e * 1e4, c * 10) if dtype == torch.float16 else (e * 1e10, c * 1e10)
        elif style == "offset":  # small integers, and a column that adds the same to all logits of a row
            e, c = (2 * e).round(), (2 * c).round()
            e[:, 0], c[:, 0] = 1, 1024 if dtype == torch.float16 else 2.0**20
        bias = torch.randn(v, generator=rng).to(dtype) if style in ("random", "masked") else None
        if style == "masked" and v > 1 and bias is not None:
            bias[seed % v] = -torch.inf
        targets = torch.randint(v, (n,), generator=rng)
        share = {"none": 0.0, "some": 0.4, "all": 1.0}[ignored]
        return cls(e.to(dtype), c.to(dtype), bias, targets.masked_fill(torch.rand(n, generator=rng) < share, -100))

    @property
    def wide(self) -> torch.dtype:
        """Of the results."""
        return torch.float64 if self.e.dtype == torch.float64 else torch.float32

    @property
    def floor(self) -> float:
        return 2**7 * torch.finfo(self.wide).eps

    def logits(self, e: Tensor, c: Tensor) -> Tensor:
        z = e @ c.T
        return z if self.bias is None else z + self.bias.double()

    def draw(self, *shape: int) -> Tensor:
        """Of the results' dtype, the same for the same problem."""
        n, v = len(self.targets), len(self.c)
        rng = torch.Generator().manual_seed(31 * n + 7 * v)
        return torch.rand(n, *shape, generator=rng, dtype=torch.float64).to(self.wide)

    def entries(self, k: int) -> Tensor:
        """(N, k) the entries after the targets, some missing; different ones if k < V."""
        found = (self.targets[:, None] + 1 + torch.arange(k)) % len(self.c)
        return found.masked_fill((self.targets < 0)[:, None] | (self.draw(k) < 0.2), -100)


def log_p(z: Tensor, k: Tensor) -> Tensor:
    """(N,) of entry k (N,); of entry 0 where there is none."""
    return z.log_softmax(-1).gather(-1, k.clamp(min=0)[:, None])[:, 0]


def log_rest(z: Tensor, kept: Tensor) -> Tensor:
    """(N,) logarithm of the probability of all entries but those ``kept`` (N, V)."""
    return z.masked_fill(kept, -torch.inf).logsumexp(-1) - z.logsumexp(-1)


def one_hot(z: Tensor, k: Tensor) -> Tensor:
    return F.one_hot(k.clamp(min=0), z.shape[-1]).bool()


def focal(x: Edge, z: Tensor, gamma: float) -> Tensor:
    lp = log_p(z, x.targets)
    return -lp if gamma == 0 else -torch.exp(gamma * log_rest(z, one_hot(z, x.targets))) * lp


def comp_sum(x: Edge, z: Tensor, tau: float) -> Tensor:
    lp = log_p(z, x.targets)
    return -lp if tau == 1 else torch.expm1((tau - 1) * lp) / (1 - tau)


def dice(x: Edge, z: Tensor, alpha: float, gamma: float) -> Tensor:
    easy = alpha * log_rest(z, one_hot(z, x.targets)) if alpha else 0
    w = torch.exp(log_p(z, x.targets) + easy)
    return (1 - w) / (w + 1 + gamma)


def rests(x: Edge, z: Tensor, likelihood: bool) -> Tensor:
    """(K, N) 1 - p of the negatives, 1 where there is none."""
    rows = []
    for k in negatives(x).T:
        counts = (k >= 0) & ((k != x.targets) | (not likelihood))
        rows.append(torch.where(counts, log_rest(z, one_hot(z, k)), 0).clamp(min=math.log(x.floor)))
    return torch.stack(rows).exp()


def negatives(x: Edge) -> Tensor:
    return x.entries(2 if len(x.c) > 2 else 1)


def unlikelihood(x: Edge, z: Tensor, likelihood: bool) -> Tensor:
    found = -0.7 * rests(x, z, likelihood).log().sum(0)
    return found - log_p(z, x.targets) if likelihood else found


def distillation(x: Edge, z: Tensor, tail: str) -> Tensor:
    entries, q = teacher(x)
    q = q.double().masked_fill(entries < 0, 0)
    q = q / q.sum(1, keepdim=True).clamp(min=1e-300) if tail == "renormalize" else q
    found = torch.zeros_like(z[:, 0])
    for k, w in zip(entries.T, q.T, strict=True):
        found = found + torch.where(w > 0, torch.xlogy(w, w) - w * log_p(z, k), 0)
    if tail == "bucket":
        rest = 1 - q.sum(1)
        found = found + torch.xlogy(rest, rest) - rest * tail_of(x, z).log()
    return found


def tail_of(x: Edge, z: Tensor) -> Tensor:
    """(N,) the student's probability of what the teacher did not keep."""
    kept = torch.zeros_like(z, dtype=torch.bool)
    for k in teacher(x)[0].T:
        kept = kept | (one_hot(z, k) & (k >= 0)[:, None])
    return log_rest(z, kept).clamp(min=math.log(x.floor)).exp()


def teacher(x: Edge) -> tuple[Tensor, Tensor]:
    """Entries (N, K) and probabilities, NaN where there is no entry; not all of the vocabulary's."""
    entries = x.entries(2 if len(x.c) > 2 else 1)
    q = (x.draw(entries.shape[1]) + 0.1) / 3
    return entries, q.masked_fill(entries < 0, torch.nan)


def coverage(x: Edge, z: Tensor, n: int) -> Tensor:
    """Of sequences of one token."""
    lp = log_p(z, x.targets)
    missed = n * torch.where(lp < -1, torch.log1p(-lp.exp()), log_rest(z, one_hot(z, x.targets)))
    value = torch.where(missed > -0.5, -torch.log(-torch.expm1(missed)), -torch.log1p(-torch.exp(missed)))
    return torch.where(lp + math.log(n) < -30, -(lp + math.log(n)), value)


def policy(x: Edge) -> dict[str, Tensor]:
    """Advantages that are 0, too; ratios that overflow float32 unless they count; NaN where ignored."""
    n = len(x.targets)
    a = torch.tensor([0.0, 1.0, -0.5])[torch.arange(n) % 3].to(x.wide)
    old = -torch.where(a < 0, 20, 200) * x.draw(1)[:, 0]
    return {name: y.masked_fill(x.targets < 0, torch.nan) for name, y in (("advantages", a), ("old_log_prob", old))}


def ppo(x: Edge, z: Tensor) -> Tensor:
    a, ratio = (y.nan_to_num() for y in (policy(x)["advantages"].double(), ratios(x, z)))
    return -torch.where(a > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8)) * a


def ratios(x: Edge, z: Tensor) -> Tensor:
    return torch.exp(log_p(z, x.targets) - policy(x)["old_log_prob"].double())


@dataclass(frozen=True)
class Recipe:
    """``recipe(e, c, targets, **own(x))`` is to equal ``dense(x, z)``, up to nll's error times ``noise(x, z)`` (N,)."""

    recipe: Callable[..., Tensor]
    dense: Callable[[Edge, Tensor], Tensor]
    own: Callable[[Edge], dict[str, Any]]
    noise: Callable[[Edge, Tensor], Tensor] = lambda x, z: torch.ones_like(z[:, 0])


def of(recipe: Any, dense: Any, noise: Any = Recipe.noise, **own: float) -> Recipe:
    """With numbers as its own arguments, in the order of the formula's."""
    return Recipe(recipe, lambda x, z: dense(x, z, *own.values()), lambda x: own, noise)


def steepness(alpha: float) -> Any:
    """Of (1 - p)^alpha, which is infinite at p = 1 where alpha is below 1."""

    def noise(x: Edge, z: Tensor) -> Tensor:
        rest = log_rest(z, one_hot(z, x.targets)).exp().clamp(min=torch.finfo(x.wide).eps)
        return rest ** (min(alpha or 1, 1) - 1)

    return noise


def of_negatives(likelihood: bool) -> Recipe:
    return Recipe(
        losses.unlikelihood,
        lambda x, z: unlikelihood(x, z, likelihood),
        lambda x: {"negatives": negatives(x), "alpha": 0.7, "likelihood": likelihood},
        lambda x, z: (1 / rests(x, z, likelihood)).sum(0),
    )


def of_teacher(tail: str) -> Recipe:
    return Recipe(
        losses.top_k_distillation,
        lambda x, z: distillation(x, z, tail),
        lambda x: {"target_weight": teacher(x)[1], "tail": tail},
        lambda x, z: 1 / tail_of(x, z) if tail == "bucket" else torch.ones_like(z[:, 0]),
    )


RECIPES: dict[str, Recipe] = {
    **{f"focal-{g}": of(losses.focal, focal, gamma=g) for g in (0, 0.5, 2)},
    **{
        f"comp_sum-{t}": of(
            losses.comp_sum, comp_sum, lambda x, z, t=t: torch.exp((t - 1) * log_p(z, x.targets)).clamp(min=1), tau=t
        )
        for t in (0, 0.5, 1, 1.7, 2)
    },
    "gce": of(losses.generalized_cross_entropy, lambda x, z, q: comp_sum(x, z, 1 + q), q=0.7),
    **{f"dice-{a}": of(losses.dice, dice, steepness(a), alpha=a, gamma=1) for a in (0, 0.5, 1)},
    "z_loss": of(
        losses.z_loss, lambda x, z, k: k * z.logsumexp(-1) ** 2, lambda x, z: z.logsumexp(-1).abs(), coefficient=0.3
    ),
    **{f"unlikelihood-{likelihood}": of_negatives(likelihood) for likelihood in (False, True)},
    **{f"pass_at_n-{n}": of(losses.pass_at_n, coverage, n=n) for n in (1, 2, 1000, 2**40)},
    "ppo": Recipe(losses.ppo, ppo, policy, lambda x, z: 1 + ppo(x, z).abs()),
    **{f"distillation-{tail}": of_teacher(tail) for tail in ("drop", "renormalize", "bucket")},
}
