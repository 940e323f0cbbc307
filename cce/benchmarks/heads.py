"""Problems to measure: hidden states, a head and targets, from random, synthetic or trained data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Device = torch.device | str
_STEP = 2**14  # rows of the head generated at a time
CHUNK_LOGITS = 2**27  # float32 logits held at once, in a few copies


@dataclass(frozen=True)
class Head:
    """Hidden states ``e`` (N, D), a head ``c`` (V, D) and targets (N,)."""

    name: str
    e: Tensor
    c: Tensor
    targets: Tensor


def random(n: int, d: int, v: int, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Head:
    """Head with normal logits of standard deviation 1.5 and arbitrary targets, for which no filter is made."""
    rng = torch.Generator(device).manual_seed(0)
    e = torch.randn(n, d, generator=rng, device=device).to(dtype)
    c = torch.cat([x.to(dtype) for x in _normal_rows(v, d, 1.5 / d**0.5, rng)])
    return Head("random", e, c, torch.randint(v, (n,), generator=rng, device=device))


def peaked(n: int = 1024, d: int = 512, v: int = 32_000) -> Head:
    """Head with Zipf frequencies along a common mean row, ids in random order: the goal on a CPU (bench/cpu.py)."""
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(d, generator=rng)
    mean /= mean.norm()
    rank = torch.randperm(v, generator=rng).add(1).log()[:, None]
    e = torch.randn(n, d, generator=rng) + 4 * mean
    c = torch.randn(v, d, generator=rng) * (1.0 / d**0.5) + (1 - 0.4 * rank) * mean
    return Head("peaked", e, c, sampled_targets(e, c, rng))


def synthetic(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    *,
    entropy: float = 2.5,
    mean_norm: float = 0.7,
    zipf: float = 1.0,
    fade: float = 0.6,
    seed: int = 0,
) -> Head:
    """Head like a trained one: Zipf frequencies, rows with a large mean, rows of ``e`` of different certainty.

    A logit is a term for the entry's frequency, along a direction that all rows of ``e`` share, plus a normal term of
    the row. The latter is scaled to the required mean entropy, and smaller for rare entries, whose rows training has
    moved less: so the entries that matter to a row are mostly frequent ones, as in a trained head. Targets are drawn
    from the softmax, so that the model is calibrated: its loss is its entropy. Ids are roughly in the order of
    frequency, as in a BPE.

    Args:
        n, d, v: sizes; D must be at least 2.
        dtype, device: those of ``e`` and ``c``.
        entropy: entropy of the softmax in nats, mean over the rows.
        mean_norm: norm of the mean row of ``c`` divided by the mean norm of its rows, in [0, 1).
        zipf: exponent of the frequencies' Zipf law.
        fade: relative reduction of a row's own term from the most frequent entry to the rarest, in [0, 1).
        seed: seed of everything random.
    """
    rng = torch.Generator(device).manual_seed(seed)
    # Two directions: along one, rows of e read an entry's frequency; the mean row of c, along the other, shifts no
    # logit.
    direction, shared = torch.linalg.qr(torch.randn(d, 2, generator=rng, device=device)).Q.T.contiguous()
    ids = torch.arange(1, v + 1, device=device).log()
    order = (ids + 0.5 * torch.randn(v, generator=rng, device=device)).argsort()
    rank = torch.empty(v, device=device)
    rank[order] = ids  # log of the rank of every entry
    height = 2.0 * math.sqrt(d)  # of every row of e along the direction: half of its norm, as in trained heads
    frequency = -zipf / height * rank
    own = 1 - fade * rank / math.log(max(v, 2))  # norm of an entry's row without the direction
    spread = math.sqrt(float(own.square().mean() + frequency.var(correction=0)))
    mean = spread * mean_norm / math.sqrt(1 - mean_norm**2) * shared
    normal, along = _normal_rows(v, d, d**-0.5, rng), frequency - frequency.mean()
    rows = (x * a[:, None] + b[:, None] * direction + mean for x, a, b in zip(normal, *_split(own, along), strict=True))
    c = torch.cat([x.to(dtype) for x in rows])
    states = torch.randn(n, d, generator=rng, device=device)
    certainty = 0.5 + torch.rand(n, 1, generator=rng, device=device)
    states *= certainty
    e = (
        _sharpness(states[: max(16, min(64, 2**22 // v))], c, height * direction, entropy) * states + height * direction
    ).to(dtype)
    return Head("synthetic", e, c, sampled_targets(e, c, rng))


def trained_npz(path: Path, n: int = 1024) -> Head:
    """Head from held-out hidden states of the demo's model, from ``python -m cce demo --save PATH.npz``."""
    arrays = np.load(path)
    e, targets = torch.from_numpy(arrays["e"])[:n], torch.from_numpy(arrays["targets"])[:n]
    return Head("trained", e, torch.from_numpy(arrays["c"]), targets)


def row_chunks(e: Tensor, v: int) -> Iterator[Tensor]:
    """Yield the rows of ``e`` in float32, in pieces with a bounded number of logits."""
    yield from (rows.float() for rows in e.split(max(1, CHUNK_LOGITS // v)))


def sampled_targets(e: Tensor, c: Tensor, rng: torch.Generator) -> Tensor:
    """Targets drawn from the softmax, one entry per row, (N,)."""
    wide = c.float()
    logits = (rows @ wide.T for rows in row_chunks(e, len(c)))
    return torch.cat([torch.multinomial(z.softmax(1), 1, generator=rng)[:, 0] for z in logits])


def _normal_rows(v: int, d: int, scale: float, rng: torch.Generator) -> Iterator[Tensor]:
    """Normal rows (v, d), generated a few at a time."""
    for v0 in range(0, v, _STEP):
        yield torch.randn(min(_STEP, v - v0), d, generator=rng, device=rng.device) * scale


def _split(*columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return (column.split(_STEP) for column in columns)


def _sharpness(states: Tensor, c: Tensor, mean: Tensor, entropy: float) -> float:
    """Factor of ``states`` that makes the mean entropy of the softmax equal to ``entropy``."""
    wide = c.float()
    varying, constant = states @ wide.T, mean @ wide.T
    low, high = 0.0, 64.0
    for _ in range(20):
        middle = (low + high) / 2
        p = (middle * varying + constant).softmax(1)
        more = float(torch.special.entr(p).sum(1).mean()) > entropy
        low, high = (middle, high) if more else (low, middle)
    return low
