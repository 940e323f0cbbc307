"""Time and memory of the loss on a GPU, in units of one cuBLAS ``e @ c.T`` of the same run.

    python bench/gpu.py --trained lm.pt --out docs/benchmarks/h100.json

Three shapes of heads. Per shape: the forward, exact and filtered steps, a filter whose live tiles are imposed, little
scratch memory, few rows; errors against float64. ``--trained`` is what ``bench/train_lm.py`` wrote.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from imposed import errors, imposed, random_tiles, zipf_tiles
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cce
from cce.benchmarks import heads, record, shapes
from cce.benchmarks.extend import extend, load
from cce.benchmarks.float64 import reference, relative_error
from cce.benchmarks.peers import dense
from cce.benchmarks.timing import Time, compare, peak_bytes, wall_ms

#: (N, D, V): the heads of Gemma 2 (2B), Llama 3 (8B) and Qwen 3 (0.6B).
NAMES = ("gemma2", "llama3", "qwen")
SHAPES = {name: (x.n, x.d, x.v) for name, x in zip(NAMES, map(shapes.parse, shapes.GPU_SHAPES), strict=True)}
EXACT = cce.Spec(filter="none")
FILTERED = cce.Spec(filter="element")
LITTLE = 32 * 2**20
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5)
MIB = 2**20
Row = dict[str, Any]
Step = Callable[[], tuple[Tensor, ...]]


def main() -> None:
    """Measures, prints a table, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["triton"], help="they take turns in every measurement")
    parser.add_argument("--trained", type=Path, help="what bench/train_lm.py wrote")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--commit", help="to write into the record; default: the checkout's")
    options = parser.parse_args()
    rows: list[Row] = []
    for shape in options.shapes:
        for part in options.only:
            rows += [{"shape": shape, **row} for row in measured(PARTS[part], shape, options)]
            torch.cuda.empty_cache()
            if options.out:
                record.write(options.out, "cuda", options.commit, backends=options.backends, rows=rows)
    show(rows)


def measured(part: Callable[..., Iterator[Row]], shape: str, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of a part; one that fails is a row, too, so that it costs no other."""
    try:
        for row in part(*SHAPES[shape], options):
            print(shape, {name: rounded(x) for name, x in row.items()}, flush=True)
            yield row
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        yield {"what": part.__name__, "failed": repr(error)}


def random_head(n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """e, c and targets: normal logits of standard deviation 1.5."""
    head = heads.random(n, d, v, torch.bfloat16, "cuda")
    return head.e, head.c, head.targets


def forward_and_exact(n: int, d: int, v: int, options: argparse.Namespace) -> Iterator[Row]:
    """The forward alone, and exact steps with the usual and with little scratch memory."""
    e, c, targets = random_head(n, d, v)

    @torch.no_grad()
    def forward(backend: str) -> Tensor:
        return cce.loss(e, c, targets, backend=backend)

    little = cce.Spec(filter="none", scratch_bytes=LITTLE)
    runs = {}
    for backend in options.backends:
        runs[backend, "forward"] = partial(forward, backend)
        runs[backend, "exact"] = step(e, c, targets, backend, EXACT)
        runs[backend, "exact, 32 MiB"] = step(e, c, targets, backend, little)
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    times = compare(runs, e, c)
    exact = reference(e, c, targets)
    dense = [relative_error(f, x) for f, x in zip(dense_gradients(e, c, targets), exact, strict=True)]
    for (backend, name), run in runs.items():
        over = peaks[backend, name] - (0 if name == "forward" else gradient_bytes(e, c))
        row = {"backend": backend, "what": name, **timed(times, (backend, name)), "mib_over": over / MIB}
        if name != "forward":
            found = run()
            row |= {f"error_{of}": relative_error(f, x) for of, f, x in zip(("de", "dc"), found, exact, strict=True)}
            row |= {"dense_de": dense[0], "dense_dc": dense[1]}
            del found
        yield row


def imposed_filter(n: int, d: int, v: int, options: argparse.Namespace) -> Iterator[Row]:
    """Filtered steps with a given fraction of live tiles."""
    e, c, _ = random_head(n, d, v)
    tiles, blocks = -(-v // 128), -(-n // 128)
    for kind, make in (("zipf", zipf_tiles), ("random", random_tiles)):
        for fraction in FRACTIONS if kind == "zipf" else (0.1, 0.3):
            live = make(tiles, blocks, fraction, e.device)
            both = kind == "zipf" and fraction in (0.1, 0.3)
            sizes = (FILTERED.scratch_bytes, LITTLE) if both else (FILTERED.scratch_bytes,)
            made = {
                (backend, size): imposed(e, c, live, size, backend) for backend in options.backends for size in sizes
            }
            times = compare({key: it.step for key, it in made.items()}, e, c)
            for (backend, size), it in made.items():
                error = errors(e, c, it)
                over = peak_bytes(it.step) - gradient_bytes(e, c)
                yield {
                    "backend": backend,
                    "what": f"imposed {kind}, {size // MIB} MiB",
                    **timed(times, (backend, size)),
                    "live": it.live_fraction,
                    "goal_mm": 1.08 + 3.05 * it.live_fraction,
                    "mib_over": over / MIB,
                    "error_de": error[0],
                    "error_dc": error[1],
                }


def trained_filter(n: int, d: int, v: int, options: argparse.Namespace) -> Iterator[Row]:
    """Filtered steps on hidden states of a trained model, extended to the shape."""
    if options.trained is not None:
        head = extend(load(options.trained, device="cuda"), n, d, v)
        yield from filtered("extended", head.e, head.c, head.targets, options.backends)


def as_trained(n: int, d: int, v: int, options: argparse.Namespace) -> Iterator[Row]:
    """The same as they are, of no more rows than the shape has."""
    if options.trained is not None:
        head = load(options.trained, device="cuda")
        yield from filtered("trained", head.e[:n], head.c, head.targets[:n], options.backends)


def filtered(name: str, e: Tensor, c: Tensor, targets: Tensor, backends: list[str]) -> Iterator[Row]:
    """Time, memory and errors of filters, and of the exact loss."""
    exact = reference(e, c, targets)
    dense = [relative_error(f, x) for f, x in zip(dense_gradients(e, c, targets), exact, strict=True)]
    specs = {
        "by mean logit": FILTERED,
        "by mean logit, 2^-13": cce.Spec(filter="element", threshold=2.0**-13),
        "by mean logit, 2^-15": cce.Spec(filter="element", threshold=2.0**-15),
        "by mean logit, 32 MiB": cce.Spec(filter="element", scratch_bytes=LITTLE),
        "as numbered": cce.Spec(filter="element", vocab_order="natural"),
        "not compensated": cce.Spec(filter="element", compensate=False),
        "exact": EXACT,
    }
    # What no time is compared of runs on the first backend alone.
    runs = {
        (backend, label): step(e, c, targets, backend, spec)
        for backend in backends
        for label, spec in specs.items()
        if backend == backends[0] or label in ("by mean logit", "as numbered", "exact")
    }
    times = compare(runs, e, c)
    for (backend, label), run in runs.items():
        found = run()
        de, dc = (relative_error(f, x) for f, x in zip(found, exact, strict=True))
        del found
        yield {
            "backend": backend,
            "what": f"{name}, {label}",
            **timed(times, (backend, label)),
            "live": cce.live_fraction(e, c, targets, spec=specs[label], backend=backend),
            "mib_over": (peak_bytes(run) - gradient_bytes(e, c)) / MIB,
            "error_de": de,
            "error_dc": dc,
            "dense_de": dense[0],
            "dense_dc": dense[1],
        }


def few_rows(n: int, d: int, v: int, options: argparse.Namespace) -> Iterator[Row]:
    """256 rows against torch.compile's dense loss: wall clock, since the host may be what is slower."""
    e, c, targets = random_head(256, d, v)
    compiled = torch.compile(dense)
    runs = {backend: step(e, c, targets, backend, None) for backend in options.backends}
    runs["torch.compile"] = gradients_of(compiled, e, c, targets)
    times = wall_ms(runs)
    for name, run in runs.items():
        over = (peak_bytes(run) - gradient_bytes(e, c)) / MIB
        what = {"what": "256 rows, torch.compile"} if name == "torch.compile" else {"backend": name, "what": "256 rows"}
        yield {**what, "ms": times[name], "mib_over": over}


def compiled_dense(n: int, d: int, v: int, options: argparse.Namespace) -> Iterator[Row]:
    """What torch.compile makes of the dense loss."""
    e, c, targets = random_head(n, d, v)
    run = gradients_of(torch.compile(dense), e, c, targets)
    times = compare({"torch.compile": run}, e, c)
    over = (peak_bytes(run) - gradient_bytes(e, c)) / MIB
    yield {"what": "torch.compile", **timed(times, "torch.compile"), "mib_over": over}


PARTS = {
    "exact": forward_and_exact,
    "imposed": imposed_filter,
    "extended": trained_filter,
    "trained": as_trained,
    "few": few_rows,
    "compiled": compiled_dense,
}


def dense_gradients(e: Tensor, c: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Of the dense loss in the dtype of ``e``, 2048 rows at a time, summed in float32."""
    de, dc = torch.empty_like(e), torch.zeros(c.shape, device=c.device)
    for n0 in range(0, len(e), 2048):
        rows = slice(n0, n0 + 2048)
        z = (e[rows] @ c.T).float()
        dz = torch.softmax(z, 1, out=z)
        dz[torch.arange(len(dz)), targets[rows]] -= 1
        factor = (dz / len(e)).to(e.dtype)
        del z, dz
        de[rows] = factor @ c
        dc += (factor.T @ e[rows]).float()
    return de, dc.to(c.dtype)


def gradients_of(
    loss: Callable[..., Tensor], e: Tensor, c: Tensor, targets: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward, new leaves each time."""

    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (e, c)]
        return torch.autograd.grad(loss(leaves[0], leaves[1], targets), leaves)

    return run


def step(
    e: Tensor, c: Tensor, targets: Tensor, backend: str, spec: cce.Spec | None
) -> Callable[[], tuple[Tensor, ...]]:
    """The same with cce."""
    return gradients_of(lambda x, y, t: cce.loss(x, y, t, backend=backend, spec=spec), e, c, targets)


def gradient_bytes(e: Tensor, c: Tensor) -> int:
    return e.nbytes + c.nbytes


def timed(times: dict[Any, Time], name: object) -> Row:
    """The figures of a candidate."""
    found = times[name]
    return {"ms": found.ms, "mm": found.mm, "mm_low": found.low, "mm_high": found.high, "mm_ms": times["mm"].ms}


def rounded(x: object) -> object:
    return float(f"{x:.4g}") if isinstance(x, float) else x


def show(rows: list[Row]) -> None:
    """The record as a table."""
    names = (
        "shape",
        "backend",
        "what",
        "ms",
        "mm",
        "goal_mm",
        "live",
        "mib_over",
        "error_de",
        "dense_de",
        "error_dc",
        "dense_dc",
    )
    table = Table(*names)
    for row in rows:
        table.add_row(*(str(rounded(row.get(name, row.get("failed", "") if name == "ms" else ""))) for name in names))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
