"""Heads on the GPU, and what their losses and gradients are: in float64, and as the dense computation has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STEP = 4096  # entries at a time


@dataclass(frozen=True)
class Head:
    """Hidden states ``e`` (N, D), a head ``c`` (V, D) and targets (N,)."""

    e: Tensor
    c: Tensor
    targets: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.e.detach().requires_grad_(), self.c.detach().requires_grad_()


def peaked(n: int, d: int, v: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Head:
    """Zipf frequencies, most frequent first, along a common mean row; some targets are the last entries."""
    rng = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cuda")

    mean = F.normalize(normal(d), dim=0)
    c = torch.empty(v, d, dtype=dtype, device="cuda")
    for v0 in range(0, v, STEP):
        part = c[v0 : v0 + STEP]
        rank = torch.arange(v0 + 1, v0 + len(part) + 1, device="cuda").log()[:, None]
        part.copy_(normal(len(part), d) / d**0.5 + (1 - 0.4 * rank) * mean)
    targets = torch.randint(v, (n,), generator=rng, device="cuda")
    targets[::4] = v - 1 - torch.arange(len(targets[::4]), device="cuda") % min(v, 100)
    return Head((normal(n, d) + 4 * mean).to(dtype), c, targets)


@dataclass(frozen=True)
class Answer:
    """The mean loss and its gradients.

    Attributes:
        loss: a scalar.
        de: (N, D); dc: rows of dC.
    """

    loss: Tensor
    de: Tensor
    dc: Tensor


@dataclass(frozen=True)
class Truth(Answer):
    """In float64.

    Attributes:
        small: (N,) what each row's probabilities of at most the threshold sum to.
    """

    small: Tensor


def truth(head: Head, rows: Tensor, threshold: float) -> Truth:
    """The answer, dC of the entries ``rows`` only; the vocabulary in pieces, twice."""
    e, n, v = head.e.double(), len(head.e), len(head.c)
    pieces = [slice(v0, min(v, v0 + STEP)) for v0 in range(0, v, STEP)]
    lse = torch.full((n,), -torch.inf, dtype=torch.float64, device="cuda")
    for piece in pieces:
        lse = torch.logaddexp(lse, (e @ head.c[piece].double().T).logsumexp(1))
    of_target = (e * head.c[head.targets].double()).sum(1)
    de, small = -head.c[head.targets].double(), torch.zeros_like(lse)
    for piece in pieces:
        c = head.c[piece].double()
        p = (e @ c.T - lse[:, None]).exp()
        de += p @ c
        small += torch.where(p <= threshold, p, 0).sum(1)
    dc = torch.empty(len(rows), e.shape[1], dtype=torch.float64, device="cuda")
    for i in range(0, len(rows), STEP):
        some = rows[i : i + STEP]
        p = (e @ head.c[some].double().T - lse[:, None]).exp()
        dc[i : i + STEP] = (p - (head.targets[:, None] == some).double()).T @ e
    return Truth((lse - of_target).mean(), de / n, dc / n, small)


def dense(head: Head, rows: Tensor) -> Answer:
    """The answer of the logits in memory, in the head's dtype."""
    e, c = head.leaves()
    loss = F.cross_entropy(F.linear(e, c), head.targets)
    de, dc = torch.autograd.grad(loss, (e, c))
    return Answer(loss.detach(), de, dc[rows])
