"""Rows of the record for one head: errors first, then memory, then the time of correct candidates."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cce.benchmarks import timing
from cce.benchmarks.candidates import Candidate, one_line
from cce.benchmarks.heads import Head
from cce.benchmarks.oracle import Oracle, floor, live_tiles
from cce.benchmarks.peers import Loss, Peer

MIB = 2**20
PASSES = ("forward", "forward+backward")
#: A peer that leaves out gradients by design is still wrong if its error is half of a gradient.
APPROXIMATE = 0.5

Row = dict[str, Any]
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Effort:
    """Duration of a measurement.

    Attributes:
        rounds: number of turns of all candidates.
        span_ms: duration of one candidate's measurement in a round.
    """

    rounds: int = 5
    span_ms: float = 120


@dataclass
class Entry:
    """Unfinished row, and the function to time if it is correct."""

    row: Row
    candidate: Candidate
    run: Step | None = None
    slow_ms: float | None = None  # of a step too slow to be repeated


#: Candidates and passes found slow before, and their milliseconds.
Slow = dict[tuple[str, str], float]


def measured(
    head: Head,
    candidates: Iterable[Candidate],
    passes: Iterable[str],
    effort: Effort,
    bandwidth: float,
    slow: Slow | None = None,
) -> Iterator[str | Row]:
    """Measure a head: yield a line of text for each step, for a progress bar, and at the end all rows.

    A forward has no filter, so it is measured only in the first mode of a backend. Candidates in ``slow`` are skipped;
    those found to be slow are added to it.
    """
    oracle, entries, seen, slow = Oracle(head), list[Entry](), set[str](), {} if slow is None else slow
    for candidate in candidates:
        for name in passes:
            if name == PASSES[0] and candidate.name in seen:
                continue
            entries.append(checked(oracle, candidate, name, slow.get((candidate.key, name))))
            yield f"{candidate.key}, {name}: {entries[-1].row['status']}"
        seen.add(candidate.name)
    runs = {str(i): entry.run for i, entry in enumerate(entries) if entry.run is not None and entry.slow_ms is None}
    for found in timing.turns(runs, head.e, head.c, effort.rounds, effort.span_ms):
        if isinstance(found, str):
            yield "timing"
            continue
        mm = found["mm"].ms
        yield {"name": "mm", "mode": "", "pass": "e @ c.T", "status": "ok", **_times(found["mm"])}
        for i, entry in enumerate(entries):
            if entry.run is not None:
                entry.row |= _times(found[str(i)] if entry.slow_ms is None else timing.once(entry.slow_ms, mm))
                entry.row |= _roofline(head, entry, mm, bandwidth)
                entry.run = None
                if timing.slow(entry.row["time_ms"], head.e.device):
                    slow[entry.candidate.key, entry.row["pass"]] = entry.row["time_ms"]
            yield entry.row


def step(loss: Loss, head: Head) -> Step:
    """Compute loss, dE and dC, from the same leaves each time."""
    e, c = (x.detach().requires_grad_() for x in (head.e, head.c))

    def run() -> tuple[Tensor, ...]:
        value = loss(e, c, head.targets)
        return (value.detach(), *torch.autograd.grad(value, (e, c)))

    return run


def forward(loss: Loss, head: Head) -> Step:
    """Compute the loss without gradients."""

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        return (loss(head.e, head.c, head.targets),)

    return run


def checked(oracle: Oracle, candidate: Candidate, name: str, slow_before: float | None = None) -> Entry:
    """Row with status, errors and memory; skipped if the candidate was slow before (``slow_before``: milliseconds).

    Raises:
        RuntimeError: the candidate has left the GPU unusable for this process.
    """
    head = oracle.head
    row: Row = {"name": candidate.name, "mode": candidate.mode, "pass": name}
    if candidate.peer is not None:
        row |= {"lacks": list(candidate.peer.lacks), "version": candidate.peer.version, "note": candidate.peer.note}
    if candidate.loss is None:
        return Entry({**row, "status": candidate.status, "reason": candidate.reason}, candidate)
    if slow_before is not None:
        reason = f"took {slow_before:,.0f} ms before, on other data or a smaller size"
        return Entry({**row, "status": "skipped", "reason": reason}, candidate)
    run = (forward if name == PASSES[0] else step)(candidate.loss, head)
    try:
        row |= errors(oracle, candidate, run())
        size, slow_ms = timing.peak_and_slow_ms(run, head.e.device)
    except Exception as error:
        _recover(candidate, head.e.device)
        return Entry({**row, "status": "failed", "reason": one_line(error)}, candidate)
    gradients = 0 if name == PASSES[0] else head.e.nbytes + head.c.nbytes
    row |= {"peak_mib": size / MIB, "over_gradients_mib": (size - gradients) / MIB}
    reason = wrong(row, head.e.dtype, len(head.c), candidate.peer)
    if reason:
        return Entry({**row, "status": "wrong", "reason": reason}, candidate)
    return Entry({**row, "status": "ok"}, candidate, run, slow_ms)


def errors(oracle: Oracle, candidate: Candidate, found: tuple[Tensor, ...]) -> Row:
    """Relative errors against float64, and for a filter also against the gradients its live tiles should give."""
    row: Row = {"error_loss": abs(float(found[0]) - oracle.loss) / abs(oracle.loss)}
    if len(found) == 1:
        return row
    sample = oracle.sample(candidate.spec)
    row["error_de"], row["error_dc"] = sample.errors(found[1:])
    row["dense_de"], row["dense_dc"] = sample.dense
    row["live"] = 1.0
    if candidate.filtered:
        assert candidate.problem is not None and candidate.spec is not None
        live = live_tiles(oracle.head, candidate.name, candidate.problem, candidate.spec)
        row["filter_de"], row["filter_dc"] = sample.errors(found[1:], oracle.gradients(sample, live))
        row |= {"live": live.fraction(len(oracle.head.c), sample.block_v), "threshold": candidate.spec.threshold}
    return row


def wrong(row: Row, dtype: torch.dtype, v: int, peer: Peer | None = None) -> str:
    """Reason why a row's errors are too large, or "", by the rule in docs/reproducibility.md.

    >>> wrong({"error_loss": 1e-6, "error_de": 0.3, "error_dc": 0.002, "dense_de": 0.001, "dense_dc": 0.001},
    ...       torch.bfloat16, 100)
    'dE errs by 0.3, allowed 0.01'
    """
    # The logits of a peer may have the inputs' dtype; ours are at least float32.
    of_loss = floor(dtype if peer else torch.promote_types(dtype, torch.float32), v)
    if not row["error_loss"] <= of_loss:
        return f"the loss errs by {row['error_loss']:.2g}, allowed {of_loss:.2g}"
    for of, title in (("de", "dE"), ("dc", "dC")):
        if f"error_{of}" in row:
            found: float = row[f"filter_{of}" if f"filter_{of}" in row else f"error_{of}"]
            allowed = APPROXIMATE if peer and peer.approximate else max(2 * row[f"dense_{of}"], floor(dtype, v))
            if not found <= allowed:
                return f"{title} errs by {found:.2g}, allowed {allowed:.2g}"
    return ""


def _recover(candidate: Candidate, device: torch.device) -> None:
    """Free memory held by a failure; a GPU that no longer answers ends the run, as later results would be invalid."""
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as lost:
        raise RuntimeError(f"{candidate.key} left the GPU unusable: {one_line(lost)}") from lost
    torch.cuda.empty_cache()


def _times(found: timing.Time) -> Row:
    return {
        "time_ms": found.ms,
        "time_low_ms": found.ms_low,
        "time_high_ms": found.ms_high,
        "mm": found.mm,
        "mm_low": found.low,
        "mm_high": found.high,
        "rounds": found.rounds,
    }


def _roofline(head: Head, entry: Entry, mm_ms: float, bandwidth: float) -> Row:
    """Least time: products at the speed of ``mm``, or memory traffic at the speed of a copy, whichever is longer."""
    alone = entry.row["pass"] == PASSES[0]
    products = entry.candidate.products(alone, entry.row.get("live", 1.0))
    inputs = head.e.nbytes + head.c.nbytes
    traffic_ms = inputs * (1 if alone else 3) / bandwidth * 1e3  # read twice, gradients written
    return {"products": products, "roofline": max(products * mm_ms, traffic_ms) / entry.row["time_ms"]}
