"""``cce tune``: time launch configurations of the triton backend, and keep the fastest for this GPU."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cce
from cce.cli.arguments import explain_training, usable_device, whole_number
from cce.cli.errors import UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

    from cce.tuning.search import Progress, Tuned

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STEP = 4096  # rows of the head generated at a time


def add_parser(commands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the command and its options."""
    text = "Time launch configurations of the triton backend for a problem, and keep the fastest for this GPU."
    parser = commands.add_parser("tune", help=text[0].lower() + text[1:-1], description=text)
    size = whole_number(1, 2**31 - 1)
    parser.add_argument("--n", type=size, required=True, help="tokens a step")
    parser.add_argument("--d", type=size, required=True, help="width of the hidden states")
    parser.add_argument("--v", type=size, required=True, help="size of the vocabulary")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--filter", choices=("none", "element", "tile"), help="default: chosen by cce for the problem")
    parser.add_argument(
        "--vocab-order",
        choices=("mean_logit", "natural"),
        help="default: mean_logit with a filter; use natural for a vocabulary sorted by frequency",
    )
    parser.add_argument("--bias", action="store_true", help="the head has a bias")
    parser.add_argument("--softcap", type=_positive, metavar="X", help="softcap of the logits (default: none)")
    parser.add_argument("--entropy", action="store_true", help="the entropy is computed too (cce.terms)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--rounds", type=whole_number(1), default=5, help="number of rounds (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check every option, then tune.

    Raises:
        UsageError: an option cannot be used, or the problem is too large for the GPU.
    """
    from cce.tuning import autotune

    dtype, spec = DTYPES[args.dtype], cce.Spec(filter=args.filter, vocab_order=args.vocab_order)
    device = timed_device(args.device, dtype, spec)
    try:
        e, c, targets = head(args.n, args.d, args.v, dtype, device)
        bias = torch.zeros(args.v, dtype=dtype, device=device, requires_grad=True) if args.bias else None
        options: dict[str, Any] = {"softcap": args.softcap, "outputs": ("entropy",) if args.entropy else ()}
        with _progress() as progress:
            tuned = autotune(e, c, targets, bias, spec=spec, rounds=args.rounds, progress=progress, **options)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"--n, --d, --v: got {args.n}, {args.d}, {args.v}, which do not fit into the memory of {device}, "
            "expected less"
        ) from error
    except (ValueError, cce.BackendUnavailable) as error:
        raise UsageError(" ".join(str(error).split())) from error
    _show(tuned)


def timed_device(text: str, dtype: torch.dtype, spec: cce.Spec) -> torch.device:
    """Return the device called ``text`` after checking that the backend runs there and can be timed.

    Raises:
        UsageError: it does not run, or cannot be timed.
    """
    device = usable_device(text)
    reasons = explain_training(device, dtype, "triton", spec).reasons["triton"]
    if device.type != "cuda" or reasons:  # Triton's interpreter runs on a CPU
        why = f" (backend 'triton': {'; '.join(reasons)})" if reasons else ""
        raise UsageError(f"--device: got {text!r}{why}, expected a CUDA device to take times on")
    return device


def head(n: int, d: int, v: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states (N, D), a head (V, D) and targets (N,) like those of a trained model.

    Frequencies fall with the rank by Zipf's law, along a mean row that all rows share, so that a filter keeps about as
    many tiles as for a trained model.
    """
    rng = torch.Generator(device).manual_seed(0)
    mean = F.normalize(torch.randn(d, generator=rng, device=device), dim=0)
    c = torch.empty(v, d, dtype=dtype, device=device)
    for v0 in range(0, v, _STEP):
        part = c[v0 : v0 + _STEP]
        rank = torch.arange(v0 + 1, v0 + len(part) + 1, device=device).log()[:, None]
        noise = torch.randn(len(part), d, generator=rng, device=device)
        part.copy_(noise / d**0.5 + (1 - 0.4 * rank) * mean)
    e = (torch.randn(n, d, generator=rng, device=device) + 4 * mean).to(dtype)
    # Ranks with density 1 / rank.
    targets = (v ** torch.rand(n, generator=rng, device=device)).long().clamp(1, v) - 1
    return e.requires_grad_(), c.requires_grad_(), targets


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number > 0")
    return value


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """Progress bar, if ``rich`` is installed."""
    if find_spec("rich") is None:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("forward", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _show(tuned: Tuned) -> None:
    if find_spec("rich") is None:
        print(tuned)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cce.tuning.search import number

    table = Table(title="ms: a step of the phase the kernel works in; ratio: to the shipped tile", title_justify="left")
    for name in ("kernel", "tile"):
        table.add_column(name)
    for name in ("ms", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in tuned.rows:
        # Text: an error may hold square brackets, which are not markup.
        style = "bold" if "chosen" in row.note else ""
        cells = (row.kernel, str(row.tile), number(row.ms, 3), number(row.ratio, 3), row.note)
        table.add_row(*map(Text, cells), style=style)
    console = Console()
    console.print(table)
    console.print(f"kept in {tuned.path}", markup=False, soft_wrap=True)
