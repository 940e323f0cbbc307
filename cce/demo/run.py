"""The whole demo, from the text to the tables and the picture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import cce
from cce.demo.config import Options, Size
from cce.demo.evaluate import evaluate
from cce.demo.measure import measure
from cce.demo.plot import draw
from cce.demo.report import Report, show
from cce.demo.text import Corpus, TextError, read_corpus
from cce.demo.tokens import load_tokens
from cce.demo.train import Loss, Training, cce_loss, dense_loss, precision, training_dtype

#: Least number of training tokens in a text, in batches: fewer would be memorised.
LEAST_BATCHES = 20


def evaluated_dtypes(device: torch.device) -> list[torch.dtype]:
    """Dtypes a backend has to support: that of the training, and that of the filter's evaluation."""
    return list(dict.fromkeys([training_dtype(device), torch.bfloat16]))


def demo(options: Options, size: Size | None = None, console: Console | None = None) -> Report:
    """Run the demo and show its results on ``console``.

    Args:
        options: the user's choices; all paths and devices must be known to work.
        size: sizes of text and model, for tests; None stands for the demo's default.
        console: console to print to; None stands for stdout.

    Raises:
        TextError: the text cannot be read, or is too short.
    """
    size, console = size or Size(), console or Console()
    start = time.perf_counter()
    training, held_out = _tokens(options, size, console)
    losses: dict[str, Loss] = {"dense": dense_loss, "cce": cce_loss(options.backend, options.spec)}
    runs = _train(losses, training, options, size, console)
    with console.status("measuring time, memory and accuracy of the loss"):
        e, targets = hidden_states(runs["cce"].model, held_out, options.device)
        c = runs["cce"].model.head.detach()
        report = _measure(runs, losses, (e[: size.measured], c, targets[: size.measured]), options, size)
    show(report, console)
    draw(report, options.out)
    console.print(f"\npicture: {options.out}", highlight=False, soft_wrap=True)
    if options.save is not None:
        save(options.save, e=e, c=c, targets=targets, unigram_counts=torch.bincount(training, minlength=size.vocab))
        console.print(f"hidden states: {options.save}", highlight=False, soft_wrap=True)
    console.print(f"total: {time.perf_counter() - start:.0f} s", highlight=False)
    return report


def hidden_states(model: torch.nn.Module, windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states e (N, D) and targets (N,) of token windows (B, L + 1)."""
    windows = windows.to(device)
    with torch.no_grad(), precision(device):
        return model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()


def save(path: Path, **tensors: Tensor) -> None:
    """Write tensors by name: a dictionary for ``torch.load`` (.pt), or arrays for ``numpy.load`` (.npz)."""
    kept = {name: (x.float() if x.is_floating_point() else x).cpu() for name, x in tensors.items()}
    if path.suffix.lower() == ".pt":
        torch.save(kept, path)
    else:
        arrays: dict[str, Any] = {name: x.numpy() for name, x in kept.items()}
        np.savez_compressed(path, **arrays)


def _tokens(options: Options, size: Size, console: Console) -> tuple[Tensor, Tensor]:
    """Training tokens (L,), and held-out windows (B, L + 1) from the end of the text."""
    with console.status("reading the text"):
        corpus = read_corpus(options.text, size.text_bytes)
    with console.status(f"training a tokenizer of {size.vocab:,} entries, and tokenizing"):
        tokens = load_tokens(corpus, size.vocab)
    window = size.context + 1
    held_out = size.held_out * window
    needed = held_out + LEAST_BATCHES * size.batch * window
    if len(tokens) < needed:
        raise TextError(f"found {len(tokens):,} tokens in {corpus.source}, expected at least {needed:,}")
    console.print(_describe(corpus, len(tokens)), highlight=False, soft_wrap=True)
    return tokens[:-held_out], tokens[-held_out:].view(size.held_out, window)


def _describe(corpus: Corpus, tokens: int) -> str:
    files = f"{corpus.files:,} file{'s' if corpus.files != 1 else ''}"
    skipped = f", {corpus.skipped:,} skipped that are not UTF-8 text" if corpus.skipped else ""
    characters = f"{corpus.characters / 1e6:.1f} million characters"
    return f"text: {corpus.source}, {characters} in {files}{skipped}; {tokens:,} tokens"


def _train(
    losses: Mapping[str, Loss], tokens: Tensor, options: Options, size: Size, console: Console
) -> dict[str, Training]:
    """Train one model per loss. They take turns step by step, so that a slowdown of the machine affects all."""
    columns = (
        TextColumn("{task.description:>5}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:6.3f}  {task.fields[speed]:7,.0f} tokens/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    runs = {name: Training(loss, tokens, options, size) for name, loss in losses.items()}
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(name, total=options.steps, loss=float("nan"), speed=0.0) for name in runs}
        for _ in range(options.steps):
            for name, run in runs.items():
                run.step()
                progress.update(bars[name], advance=1, loss=run.losses[-1], speed=run.tokens_per_second)
    return runs


def _measure(
    runs: Mapping[str, Training],
    losses: Mapping[str, Loss],
    sample: tuple[Tensor, Tensor, Tensor],
    options: Options,
    size: Size,
) -> Report:
    e, c, targets = sample
    costs = measure(losses, e, c, targets, size.repeats)
    with precision(options.device):
        spec = cce.explain(e, c, targets, backend=options.backend, spec=options.spec).spec
    filtered = cce.explain(e.bfloat16(), c.bfloat16(), targets, spec=cce.Spec(filter="element")).spec
    return Report(
        dense=runs["dense"],
        fused=runs["cce"],
        dense_cost=costs["dense"],
        fused_cost=costs["cce"],
        gradient_bytes=e.nbytes + c.nbytes,
        mode="exact" if spec.filter == "none" else "filtered",
        measured=len(e),
        threshold=float(filtered.threshold or 0.0),
        accuracy=evaluate(e, c, targets, options.backend),
    )
