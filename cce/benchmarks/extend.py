"""Extension of a trained head (from ``bench/train_lm.py``) to any larger shape, with the same statistics.

    python -m cce.benchmarks.extend /tmp/lm/base.pt --shapes 8192x2304x256000 8192x4096x128256 16384x1024x151936

prints the statistics of the head and of its extensions side by side. Each size is extended so that they are preserved:

- D: by an isometry, which changes no inner product of e and c, and so neither the logits nor the filter or its errors.
- N: by copies of the rows with a little noise (or reduced to the first rows).
- V: by entries after the given ones, as in a BPE, each a mix of two rare ones. Their logits are lowered according to
  their rank in the Zipf law of the training text's counts, and all together so that the probability of all new entries,
  over the rows, is that of the law. Targets stay among the given entries, so that few tiles of new ones are live:
  compare live fractions, and the share of the later half's mass that is in hits, with the real ones.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cce.benchmarks.heads import Head, row_chunks
from cce.benchmarks.statistics import Column, measure, show

SHAPES = ("8192x2304x256000", "8192x4096x128256", "16384x1024x151936")
ROW_NOISE = 0.02  # noise of a repeated row, relative to its norm
MIX = 0.5  # share of the second parent in a new entry: the squared shares add up to 1, to preserve variances


@dataclass(frozen=True)
class TrainedHead(Head):
    """A head with the training text's unigram ``counts`` (V,)."""

    counts: Tensor


@dataclass(frozen=True)
class Tail:
    """Extrapolated entries V0 to V: their parents (V - V0, 2), shift of log-probability, and share of all text."""

    parents: Tensor
    shift: Tensor
    mass: float


def load(path: Path, device: torch.device | str = "cpu") -> TrainedHead:
    """Load a file written by ``bench/train_lm.py`` or ``python -m cce demo --save PATH.pt``."""
    found = torch.load(path, map_location=device, weights_only=True)
    e, c = found["e"].bfloat16(), found["c"].bfloat16()
    return TrainedHead("trained", e, c, found["targets"].long(), found["unigram_counts"].long())


def facts(path: Path) -> dict[str, Any]:
    """Facts about the training of a saved head; files from the demo have none."""
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("facts", {})
    return {name: fact for name, fact in found.items() if not (isinstance(fact, str) and len(fact) > 100)}


def extend(head: TrainedHead, n: int, d: int, v: int, seed: int = 0) -> TrainedHead:
    """Extend the head to the problem (n, d, v), in bf16 on the device of ``head``.

    Raises:
        ValueError: ``d`` or ``v`` is smaller than the head's.
    """
    (d0, v0), device = (head.c.shape[1], len(head.c)), head.e.device
    if d < d0 or v < v0 or n < 1:
        raise ValueError(f"got N={n}, D={d}, V={v}, expected N >= 1, D >= {d0} and V >= {v0}: a head is only extended")
    rng = torch.Generator(device).manual_seed(seed)
    c, counts = _more_entries(head, v, rng)
    e, targets = _more_rows(head.e, n, rng), head.targets.repeat(-(-n // len(head.targets)))[:n]
    rotation = torch.linalg.qr(torch.randn(d, d0, generator=rng, device=device)).Q.T.contiguous()  # [D0, D]
    e, c = (torch.cat([(part.float() @ rotation).bfloat16() for part in x.split(2**14)]) for x in (e, c))
    return TrainedHead(f"{head.name}, extended", e, c, targets, counts)


def _more_rows(e: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Rows (n, D0): the first rows, or all of them followed by copies."""
    repeats = -(-n // len(e))
    rows = e.repeat(repeats, 1)[:n].float()
    copies = rows[len(e) :]
    noise = torch.randn(copies.shape, generator=rng, device=e.device) / math.sqrt(e.shape[1])
    rows[len(e) :] += ROW_NOISE * copies.norm(dim=1, keepdim=True) * noise
    return rows.bfloat16()


def _more_entries(head: TrainedHead, v: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Extended head c (v, D0) and its counts (v,)."""
    if v == len(head.c):
        return head.c, head.counts
    tail = extrapolate(head.counts, v, rng)
    first, second = (head.c[parent].float() for parent in tail.parents.T)
    mean = head.c[len(head.c) // 2 :].float().mean(0)
    new = mean + math.sqrt(1 - MIX**2) * (first - mean) + MIX * (second - mean)
    constant = constant_logit(head.e)
    new += tail.shift[:, None] * constant
    new += balance(head.e, head.c, new, tail.mass) * constant
    counts = head.counts[tail.parents[:, 0]] * tail.shift.exp()
    return torch.cat([head.c, new.bfloat16()]), torch.cat([head.counts, counts.round().long()])


def extrapolate(counts: Tensor, v: int, rng: torch.Generator) -> Tail:
    """Extrapolate entries after the given ones, by the Zipf law of the rarer half of these.

    A new entry follows a parent: it deviates from the law as the parent does, and is lower by the law's difference
    between their ranks. Ranks are ids: a BPE's merges are in the order of their frequency.
    """
    v0, device = len(counts), counts.device
    ids = torch.arange(v0 // 2, v0, device=device)
    rank, height = (ids + 1).double().log(), (counts[ids] + 0.5).double().log()
    slope = ((rank - rank.mean()) * (height - height.mean())).sum() / ((rank - rank.mean()) ** 2).sum()
    slope = slope.clamp(-3.0, -0.5)  # for a text too short to determine it
    parents = torch.randint(v0 // 2, v0, (v - v0, 2), generator=rng, device=device)
    new_rank = torch.arange(v0 + 1, v + 1, device=device).double().log()
    shift = slope * (new_rank - (parents[:, 0] + 1).double().log())
    mass = ((counts[parents[:, 0]] + 0.5) * shift.exp()).sum()
    return Tail(parents, shift.float(), float(mass / (mass + counts.sum())))


def constant_logit(e: Tensor) -> Tensor:
    """Vector w (D0,) with ``e @ w`` as near as possible to 1 in every row, which raises an entry's logit everywhere."""
    rows = e.double()
    gram = rows.T @ rows
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    return torch.linalg.solve(gram, rows.sum(0)).float()


def balance(e: Tensor, c: Tensor, new: Tensor, mass: float) -> float:
    """Number to add to the logits of ``new`` so that their mean probability over all rows is ``mass``."""
    c, chunks = c.float(), row_chunks(e, len(c) + len(new))
    odds = torch.cat([(rows @ new.T).logsumexp(1) - (rows @ c.T).logsumexp(1) for rows in chunks])
    low, high = -50.0, 50.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if float((odds + middle).sigmoid().mean()) < mass else (low, middle)
    return low


def main() -> None:
    """Print the statistics of a head and of its extensions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="what bench/train_lm.py wrote")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="NxDxV")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    head = load(options.trained, options.device)
    columns: list[Column] = [("real", measure(head, head.counts))]
    for shape in options.shapes:
        n, d, v = map(int, shape.split("x"))
        larger = extend(head, n, d, v, options.seed)
        columns.append((shape, measure(larger, larger.counts)))
        del larger
    show(columns)


if __name__ == "__main__":
    main()
