"""Statistics that determine a filter's speed and accuracy: the softmax's spectrum, and the sharing of tiles by hits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

import cce
from cce.benchmarks.heads import Head, row_chunks

HIT = 2.0**-12
ORDERS = ("natural", "unigram", "mean_logit")

#: Title and statistics of one head.
Column = tuple[str, dict[str, float]]


def measure(head: Head, counts: Tensor) -> dict[str, float]:
    """All statistics of a head with unigram ``counts`` (V,)."""
    return {**spectrum(head), **geometry(head), **live_fractions(head, counts)}


def spectrum(head: Head) -> dict[str, float]:
    """Distribution of probability over the entries of a row."""
    c, found, start = head.c.float(), defaultdict(list), 0
    for rows in row_chunks(head.e, len(c)):
        z = rows @ c.T
        targets = head.targets[start : start + len(rows), None]
        start += len(rows)
        lse = z.logsumexp(1)
        found["lse"].append(lse)
        found["nll"].append(lse - z.gather(1, targets)[:, 0])
        p = z.sub_(lse[:, None]).exp()
        found["entropy"].append(torch.special.entr(p).sum(1))
        found["largest p"].append(p.amax(1))
        hits = p >= HIT
        found["hits"].append(hits.sum(1).float())
        late = len(c) // 2  # ids are in the order of frequency: this is the rarer half of the entries
        found["late"].append(p[:, late:].sum(1))
        p.masked_fill_(hits, 0)
        found["rest"].append(p.sum(1))
        found["late rest"].append(p[:, late:].sum(1))
    row = {name: torch.cat(parts) for name, parts in found.items()}
    return {
        **{f"{name}, mean": float(row[name].mean()) for name in ("nll", "entropy", "lse")},
        "lse, standard deviation": float(row["lse"].std()),
        "largest p, mean": float(row["largest p"].mean()),
        "entries with p >= 2^-12, mean": float(row["hits"].mean()),
        **{f"entries with p >= 2^-12, {q:.0%}": float(row["hits"].quantile(q)) for q in (0.5, 0.9)},
        "mass of the other entries, mean": float(row["rest"].mean()),
        "mass of the later half of the ids, mean": float(row["late"].mean()),
        "share of that in entries with p >= 2^-12": 1 - float(row["late rest"].mean() / row["late"].mean()),
    }


def geometry(head: Head) -> dict[str, float]:
    """Common part of the rows: the omitted gradients add up along their mean."""
    rows = {"e": head.e.float(), "c": head.c.float()}
    return {
        f"norm of the mean row of {name} / mean norm": float(x.mean(0).norm() / x.norm(dim=1).mean())
        for name, x in rows.items()
    }


def live_fractions(head: Head, counts: Tensor) -> dict[str, float]:
    """Share of the logits in live tiles, rows ordered by their hits, for widths, orders and thresholds."""
    by_counts = counts.argsort(descending=True, stable=True).cpu()
    found = {}
    for block_v in (128, 256):
        for power in (12, 13):  # 13 is the library's default for bf16
            for name in ORDERS:
                spec = cce.Spec(
                    filter="element",
                    threshold=2.0**-power,
                    block_v=block_v,
                    vocab_order=by_counts if name == "unigram" else name,
                )
                key = f"live 128x{block_v} tiles at 2^-{power}, {name} order"
                found[key] = cce.live_fraction(head.e, head.c, head.targets, spec=spec)
    return found


def summary(head: Head) -> dict[str, float]:
    """Statistics, over up to 1024 rows, that show whether synthetic data resembles trained data."""
    few = Head(head.name, head.e[:1024], head.c, head.targets[:1024])
    spread, shared = spectrum(few), geometry(few)
    return {
        "nll": spread["nll, mean"],
        "entropy": spread["entropy, mean"],
        "hits": spread["entries with p >= 2^-12, mean"],
        "tail_mass": spread["mass of the other entries, mean"],
        "mean_norm_e": shared["norm of the mean row of e / mean norm"],
        "mean_norm_c": shared["norm of the mean row of c / mean norm"],
    }


def show(columns: Sequence[Column]) -> None:
    """Format the statistics side by side."""
    print(" " * 46, *(f"{title:>17}" for title, _ in columns))
    for name in columns[0][1]:
        print(f"{name:46}", *(f"{statistics[name]:17.4g}" for _, statistics in columns))
