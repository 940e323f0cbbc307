"""The problems of the CPU benchmark: random, peaked, and the demo's trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Hidden states ``e`` (N, D), a head ``c`` (V, D) and targets (N,)."""

    name: str
    e: Tensor
    c: Tensor
    targets: Tensor


def random(n: int = 1024, d: int = 512, v: int = 32_000) -> Head:
    """Normal logits of standard deviation 1.5, any target."""
    rng = torch.Generator().manual_seed(0)
    e = torch.randn(n, d, generator=rng)
    c = torch.randn(v, d, generator=rng) * (1.5 / d**0.5)
    return Head("random", e, c, torch.randint(v, (n,), generator=rng))


def peaked(n: int = 1024, d: int = 512, v: int = 32_000) -> Head:
    """Zipf frequencies along a common mean row, targets drawn from the model: a small live fraction."""
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(d, generator=rng)
    mean /= mean.norm()
    rank = torch.randperm(v, generator=rng).add(1).log()[:, None]
    e = torch.randn(n, d, generator=rng) + 4 * mean
    c = torch.randn(v, d, generator=rng) * (1.0 / d**0.5) + (1 - 0.4 * rank) * mean
    targets = torch.multinomial((e @ c.T).softmax(1), 1, generator=rng)[:, 0]
    return Head("peaked", e, c, targets)


def trained(path: Path, n: int = 1024) -> Head:
    """Held-out hidden states of the demo's model: ``python -m cce demo --save PATH``."""
    arrays = np.load(path)
    e, targets = torch.from_numpy(arrays["e"])[:n], torch.from_numpy(arrays["targets"])[:n]
    return Head("trained", e, torch.from_numpy(arrays["c"]), targets)
