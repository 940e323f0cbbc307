"""A head split over the GPUs of a host: time, strong scaling, memory, traffic, and equality with one GPU.

    torchrun --nproc-per-node 2 bench/vocab_parallel.py --out docs/benchmarks/vocab-parallel.json

Every process makes its part of the same head. First the first process runs the whole problem alone; then all run their
parts, next to the dense vocabulary-parallel loss: logits in memory, sharded, and three all-reduces (arXiv 1909.08053,
section 3). NVLink multicast stays off (NCCL_NVLS_ENABLE=0). With ``--device cpu`` it runs anywhere, on small sizes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cce
from cce.benchmarks import record

#: (N, D, V): a head of Llama 3's size, and of Gemma 3's vocabulary.
SHAPES = {"llama3": (8192, 4096, 128_256), "gemma3": (8192, 4096, 262_144)}
STEP = 4096  # entries made at a time, by generators of their own, so that every part is the same on any process
SPECS = {"exact": cce.Spec(filter="none"), "filtered": cce.Spec(filter="element")}
Step = Callable[[], tuple[Tensor, ...]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Sizes, and where the tensors are made."""

    n: int
    d: int
    v: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D) along a common direction, and targets (N,)."""
        rng = torch.Generator(self.device).manual_seed(0)
        e = torch.randn(self.n, self.d, generator=rng, device=self.device) + 4 * self._direction()
        return e.to(self.dtype), torch.randint(self.v, (self.n,), generator=rng, device=self.device)

    def head(self, first: int, last: int) -> Tensor:
        """Rows first to last of the head: Zipf frequencies along the common direction, spread over the vocabulary."""
        return torch.cat([rows for _, rows in self._pieces(first, last)]).to(self.dtype)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        for v0 in range(first - first % STEP, last, STEP):
            rng = torch.Generator(self.device).manual_seed(1 + v0)
            size = min(STEP, self.v - v0)
            rank = torch.rand(size, generator=rng, device=self.device).mul_(self.v).add_(1).log_()[:, None]
            rows = torch.randn(size, self.d, generator=rng, device=self.device) / self.d**0.5
            rows += (1 - 0.4 * rank) * self._direction()
            yield v0, rows[max(0, first - v0) : last - v0]

    def _direction(self) -> Tensor:
        rng = torch.Generator(self.device).manual_seed(2)
        return torch.nn.functional.normalize(torch.randn(self.d, generator=rng, device=self.device), dim=0)


def main() -> None:
    """Measures on all processes; the first prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["triton"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--size", nargs=3, type=int, metavar=("N", "D", "V"), help="instead of the shapes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--commit", help="to write into the record; default: the checkout's")
    options = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    device = (
        torch.device(options.device, int(os.environ["LOCAL_RANK"])) if options.device == "cuda" else torch.device("cpu")
    )
    if options.device == "cuda":
        torch.cuda.set_device(device)
    shapes = {"given": options.size} if options.size else {name: SHAPES[name] for name in options.shapes}
    rows = [row for name, shape in shapes.items() for row in measured(name, Problem(*shape, device), options)]
    if dist.get_rank() == 0:
        show(rows)
        if options.out:
            record.write(options.out, options.device, options.commit, gpus=dist.get_world_size(), rows=rows)
    dist.destroy_process_group()


def measured(name: str, problem: Problem, options: argparse.Namespace) -> Iterator[Row]:
    """One row a candidate; that of a single process comes with each, measured before."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    cuts = [problem.v * i // ranks for i in range(ranks + 1)]
    part = slice(cuts[rank], cuts[rank + 1])
    e, targets = problem.tokens()
    candidates = [(backend, mode) for backend in options.backends for mode in SPECS] + [("dense", "logits sharded")]
    alone: dict[tuple[str, str], tuple[Row, list[Tensor]]] = {}
    for backend, mode in candidates if rank == 0 else ():
        if backend != "dense":
            whole = problem.head(0, problem.v)
            run = step(e, whole, targets, backend, mode, None)
            found = [x.cpu() for x in run()]
            alone[backend, mode] = cost(run, problem, options.rounds, together=False), found
            del whole, run
    dist.barrier()
    c = problem.head(part.start, part.stop)
    for backend, mode in candidates:
        dense = backend == "dense"
        run = (
            dense_step(e, c, targets, part.start) if dense else step(e, c, targets, backend, mode, cce.VocabParallel())
        )
        found = run()
        row = cost(run, problem, options.rounds, together=True) | {"sent_mib": traffic(problem, dense, ranks) / 2**20}
        if not dense:
            # The same part as a head of its own: what is left when nothing is exchanged.
            part_alone = step(e, c, targets % len(c), backend, mode, None)
            row["parts_ms"] = cost(part_alone, problem, options.rounds, together=True)["ms"]
            row["exchange_ms"] = cost(exchange(problem, ranks), problem, options.rounds, together=True)["ms"]
            exposed = row["ms"] - row["parts_ms"]
            row["overlap"] = min(1.0, max(0.0, 1 - exposed / row["exchange_ms"]))
        every = gathered_rows(found[-1], cuts)
        if rank == 0:
            row |= compared(row, found, every, alone.get((backend, mode)), ranks)
            yield {
                "shape": name,
                "n": problem.n,
                "d": problem.d,
                "v": problem.v,
                "backend": backend,
                "mode": mode,
                **row,
            }
        del found, every
    del c


def step(e: Tensor, c: Tensor, targets: Tensor, backend: str, mode: str, split: cce.VocabParallel | None) -> Step:
    """Loss, dE and dC."""

    def run() -> tuple[Tensor, ...]:
        x, w = (y.detach().requires_grad_() for y in (e, c))
        loss = cce.loss(x, w, targets, backend=backend, spec=SPECS[mode], vocab_parallel=split)
        return (loss.detach(), *torch.autograd.grad(loss, (x, w)))

    return run


def dense_step(e: Tensor, c: Tensor, targets: Tensor, first: int) -> Step:
    """The same with this process's logits in memory: all-reduces of the maxima, of sums and targets' logits, of dE."""

    def run() -> tuple[Tensor, ...]:
        z = (e @ c.T).float()
        m = z.amax(1)
        dist.all_reduce(m, dist.ReduceOp.MAX)
        z.sub_(m[:, None])
        here = (targets >= first) & (targets < first + len(c))
        column = (targets - first).clamp(0, len(c) - 1)
        target = torch.where(here, z.gather(1, column[:, None])[:, 0], 0)
        sums = torch.stack([z.exp_().sum(1), target])
        dist.all_reduce(sums)
        loss = (sums[0].log() - sums[1]).mean()
        dz = z.div_(sums[0][:, None])
        dz[torch.arange(len(dz), device=dz.device), column] -= here.float()
        factor = (dz / len(e)).to(e.dtype)
        de = (factor @ c).float()
        dist.all_reduce(de)
        return loss, de.to(e.dtype), factor.T @ e

    return run


def exchange(problem: Problem, ranks: int) -> Step:
    """The collectives of a step alone: what a token's numbers and float32 dE take."""
    numbers = torch.zeros(problem.n, 2, device=problem.device)
    every = torch.zeros(ranks * problem.n, 2, device=problem.device)
    de = torch.zeros(problem.n, problem.d, device=problem.device)

    def run() -> tuple[Tensor, ...]:
        dist.all_gather_into_tensor(every, numbers)
        dist.all_reduce(de)
        return (de,)

    return run


def cost(run: Step, problem: Problem, rounds: int, together: bool) -> Row:
    """Median time, and the largest peak of memory over the inputs; of the slowest process where all take part."""
    cuda = problem.device.type == "cuda"
    run()
    times = []
    for _ in range(rounds):
        if together:
            dist.barrier()
        wait(cuda)
        start = time.perf_counter()
        run()
        wait(cuda)
        times.append((time.perf_counter() - start) * 1e3)
    peak = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait(cuda)
        peak = torch.cuda.max_memory_allocated() - before
    numbers = torch.tensor([statistics.median(times), float(peak)], dtype=torch.float64, device=problem.device)
    if together:
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return {"ms": float(numbers[0]), "peak_mib": float(numbers[1]) / 2**20}


def wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def traffic(problem: Problem, dense: bool, ranks: int) -> float:
    """Bytes a process sends: rings move 2 (R - 1) / R of what is reduced, (R - 1) times what is gathered."""
    reduced = 4 * problem.n * (problem.d + (3 if dense else 0)) * 2 * (ranks - 1) / ranks
    gathered = 0 if dense else 4 * problem.n * 2 * (ranks - 1)
    return reduced + gathered


def gathered_rows(dc: Tensor, cuts: list[int]) -> Tensor | None:
    """dC of all processes, on the host of the first."""
    sizes = [b - a for a, b in pairwise(cuts)]
    padded = dc.new_zeros(max(sizes), dc.shape[1])
    padded[: len(dc)] = dc
    if dist.get_rank():
        dist.send(padded, 0)
        return None
    whole = torch.empty(sum(sizes), dc.shape[1], dtype=dc.dtype)
    whole[: sizes[0]] = dc
    for rank in range(1, len(sizes)):
        dist.recv(padded, rank)
        whole[cuts[rank] : cuts[rank + 1]] = padded[: sizes[rank]]
    return whole


def compared(
    row: Row, found: tuple[Tensor, ...], dc: Tensor | None, alone: tuple[Row, list[Tensor]] | None, ranks: int
) -> Row:
    """Efficiency, and how far the results are from those of one process."""
    if alone is None or dc is None:
        return {}
    single, (loss, de, whole) = alone
    pairs = {"loss": (found[0].cpu(), loss), "de": (found[1].cpu(), de), "dc": (dc, whole)}
    gaps = {f"gap_{name}": float((x.float() - y.float()).norm() / y.float().norm()) for name, (x, y) in pairs.items()}
    efficiency = single["ms"] / (ranks * row["ms"])
    return {"alone_ms": single["ms"], "alone_peak_mib": single["peak_mib"], "efficiency": efficiency, **gaps}


def show(rows: list[Row]) -> None:
    """The record as a table."""
    names = (
        "shape", "backend", "mode", "ms", "alone_ms", "efficiency", "parts_ms", "exchange_ms", "overlap", "peak_mib",
        "alone_peak_mib", "sent_mib", "gap_loss", "gap_de", "gap_dc",
    )  # fmt: skip
    table = Table(*names, title=f"{dist.get_world_size()} processes")
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x := row.get(n, ""), float) else str(x) for n in names))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
