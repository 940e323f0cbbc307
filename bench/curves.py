"""Convergence: the demo's model pre-trained and fine-tuned with four losses, several seeds each.

    python bench/curves.py --out docs/benchmarks/curves-h100.json --plot docs/assets/curves-h100.svg

The losses are the dense one, and cce exact, filtered, and filtered without compensation. Runs of a seed share weights
and batches; all fine-tuning starts from the seed's densely pre-trained model, on another text, at a third of the
rates. Shown are means over the seeds of the difference to the dense run of the same seed, with 95 % bands, beside how
far dense runs of different seeds lie apart. About 90 s on an H100; on a CPU pass fewer steps.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

import cce
from cce.benchmarks import record
from cce.benchmarks.candidates import MODES
from cce.demo.config import Options, Size
from cce.demo.run import hidden_states
from cce.demo.text import Corpus, read_corpus
from cce.demo.tokens import train_tokenizer
from cce.demo.train import Loss, Training, cce_loss, dense_loss

WINDOW = 20  # steps a point of a curve is the mean of
PHASES = ("pre-training", "fine-tuning")
COLORS = {"dense": "#e8963c", "exact": "#2e8b57", "filtered": "#2b5c8a", "uncompensated": "#b03a48"}
#: 97.5 % quantiles of Student's distribution, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Row = dict[str, Any]
Curves = dict[str, NDArray[np.float64]]  # of a loss: (seeds, points)


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, writes the record and the picture."""
    options = parse(argv)
    demo = Options(text=options.text, steps=options.steps, device=torch.device(options.device))
    size, console = replace(Size(), batch=options.batch, vocab=options.vocab, width=options.width), Console(width=120)
    texts = tokens([read_corpus(options.text, size.text_bytes), read_corpus(options.tune_text, 3_000_000)], size)
    losses: dict[str, Loss] = {"dense": dense_loss}
    losses |= {name: cce_loss(options.backend, spec) for name, spec in MODES.items()}
    steps = dict(zip(PHASES, (options.steps, options.tune_steps), strict=True))
    found: dict[str, dict[str, list[list[float]]]] = {phase: {name: [] for name in losses} for phase in PHASES}
    held_out: list[Row] = []
    todo = list(itertools.product(range(options.seeds), PHASES, losses))
    start: dict[str, Tensor] = {}
    for seed, phase, name in track(todo, "training", console=console):
        train, test = texts[PHASES.index(phase)]
        run = replace(demo, seed=seed, steps=steps[phase])
        of_phase = (None, 1.0) if phase == PHASES[0] else (start, 1 / 3)
        trained = Training(losses[name], train, run, size, *of_phase)
        for _ in range(run.steps):
            trained.step()
        if phase == PHASES[0] and name == "dense":
            start = {key: x.clone() for key, x in trained.model.state_dict().items()}
        found[phase][name].append(trained.losses)
        held_out.append({"phase": phase, "loss": name, "seed": seed, **ending(trained, test, demo, options.backend)})
        if seed and (phase, name) == (
            PHASES[-1],
            list(losses)[-1],
        ):  # what there is after each seed: a run may be cut off
            facts = {"window": WINDOW, "steps": steps, "seeds": seed + 1, "tokens_a_step": size.batch * size.context}
            conclude(options, facts, found, held_out, console)


def conclude(
    options: argparse.Namespace, facts: Row, found: dict[str, dict[str, list[list[float]]]], held_out: list[Row],
    console: Console,
) -> None:  # fmt: skip
    """Prints the comparison, writes the record, draws the curves."""
    curves = {phase: {name: smoothed(runs) for name, runs in of_phase.items()} for phase, of_phase in found.items()}
    rows = [row for phase in PHASES for row in compared(phase, curves[phase], held_out)]
    console.print_json(data=rows)
    if options.out:
        kept = {phase: {name: x.round(4).tolist() for name, x in curves[phase].items()} for phase in PHASES}
        record.write(options.out, options.device, options.commit, **facts, rows=rows, held_out=held_out, curves=kept)
    if options.plot:
        draw(options.plot, curves)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of pre-training")
    parser.add_argument("--tune-steps", type=int, default=150, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, len(STUDENT) + 2))
    parser.add_argument("--batch", type=int, default=32, help="sequences of 64 tokens a step")
    parser.add_argument("--vocab", type=int, default=Size.vocab)
    parser.add_argument("--width", type=int, default=Size.width)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--text", type=Path, help="to pre-train on; default: Python's standard library")
    parser.add_argument(
        "--tune-text", type=Path, default=Path(torch.__file__).parent / "nn", help="default: torch/nn of this torch"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--commit", help="to write into the record; default: the checkout's")
    parser.add_argument("--plot", type=Path, help="SVG or PNG file for the picture")
    return parser.parse_args(argv)


def tokens(corpora: list[Corpus], size: Size) -> list[tuple[Tensor, Tensor]]:
    """Training tokens (L,) and held-out windows (B, L + 1) of each text, by the tokenizer of the first."""
    tokenizer, found = train_tokenizer(corpora[0], size.vocab), []
    for corpus in corpora:
        encoded = tokenizer.encode_batch_fast(corpus.pieces, add_special_tokens=False)
        ids = torch.tensor([token for piece in encoded for token in piece.ids])
        window = size.context + 1
        count = min(size.held_out, len(ids) // (4 * window))
        found.append((ids[: -count * window], ids[-count * window :].view(count, window)))
    return found


def ending(trained: Training, held_out: Tensor, demo: Options, backend: str) -> dict[str, float]:
    """Held-out loss in float32, and the live fraction there."""
    e, targets = hidden_states(trained.model, held_out, demo.device)
    c = trained.model.head.detach()
    live = cce.live_fraction(e.bfloat16(), c.bfloat16(), targets, spec=MODES["filtered"], backend=backend)
    return {"held_out": float(F.cross_entropy(e.float() @ c.float().T, targets)), "live_fraction": live}


def smoothed(runs: list[list[float]]) -> NDArray[np.float64]:
    """(seeds, points): means of WINDOW steps."""
    losses = np.asarray(runs)
    usable = losses.shape[1] // WINDOW * WINDOW
    return losses[:, :usable].reshape(len(runs), -1, WINDOW).mean(2)


def compared(phase: str, curves: Curves, held_out: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a loss: how it ends, and how far it is from the dense run of the same seed."""
    rows = []
    for name, curve in curves.items():
        gap = curve - curves["dense"]
        ends = {
            key: [row[key] for row in held_out if (row["phase"], row["loss"]) == (phase, name)]
            for key in ("held_out", "live_fraction")
        }
        dense = [row["held_out"] for row in held_out if (row["phase"], row["loss"]) == (phase, "dense")]
        mean, half = band(np.subtract(ends["held_out"], dense)[:, None])
        rows.append(
            {
                "phase": phase,
                "loss": name,
                "final": float(curve[:, -1].mean()),
                "held_out": float(np.mean(ends["held_out"])),
                "held_out_gap": float(mean[0]),
                "held_out_gap_95": float(half[0]),
                "held_out_seeds": float(np.std(ends["held_out"], ddof=1)),
                "largest_gap": float(np.abs(gap).max()),
                "mean_gap": float(gap.mean()),
                "live_fraction": float(np.mean(ends["live_fraction"])),
            }
        )
    return rows


def band(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over the seeds of (seeds, points), and half the width of its 95 % confidence interval."""
    count = len(values)
    return values.mean(0), STUDENT[count - 1] * values.std(0, ddof=1) / count**0.5


def draw(path: Path, phases: dict[str, Curves]) -> None:
    """The curves, and their differences to the dense run of the same seed."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for (left, right), (phase, curves) in zip(figure.subplots(2, 2), phases.items(), strict=True):
        steps = (np.arange(curves["dense"].shape[1]) + 0.5) * WINDOW
        for name, curve in curves.items():
            wide = {"linewidth": 4.0, "alpha": 0.6} if name == "dense" else {}
            shade(left, steps, curve, name, **wide)
            if name != "dense":
                shade(right, steps, curve - curves["dense"], name)
        spread = curves["dense"] - curves["dense"].mean(0)
        right.fill_between(steps, spread.min(0), spread.max(0), color="#dddddd", label="dense, between seeds")
        left.set_title(f"{phase[0].upper()}{phase[1:]}: loss, nats per token", loc="left")
        right.set_title("Difference to the dense run of the same seed", loc="left")
        right.set_ylim(*limits([curve - curves["dense"] for curve in curves.values()]))
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.grid(axis="y", color="#eeeeee")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def limits(gaps: list[NDArray[np.float64]]) -> tuple[float, float]:
    """An axis that the differences fill, whatever the seeds do."""
    largest = 1.3 * max(float(np.abs(gap).max()) for gap in gaps) or 1e-6
    return -largest, largest


def shade(axes: Axes, steps: NDArray[np.float64], curves: NDArray[np.float64], name: str, **style: Any) -> None:
    """A mean with its band."""
    mean, half = band(curves)
    axes.plot(steps, mean, color=COLORS[name], label=name, **style)
    axes.fill_between(steps, mean - half, mean + half, color=COLORS[name], alpha=0.15, linewidth=0)


if __name__ == "__main__":
    main()
