"""Loss curves of the demo's model on a GPU: dense runs of two seeds, and filtered ones with and without compensation.

    python bench/curves.py --steps 2000 --out docs/benchmarks/curves-h100.json --plot docs/assets/curves-h100.png

Two dense runs with different seeds tell how much curves differ that are both right; the filtered ones share the first
seed, weights and batches.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

import cce
from cce.benchmarks import record
from cce.demo.config import Options, Size
from cce.demo.run import _tokens as demo_tokens
from cce.demo.run import hidden_states
from cce.demo.train import Loss, Training, cce_loss, dense_loss

WINDOW = 50  # steps a point of a curve is the mean of


@dataclass(frozen=True)
class Run:
    """A curve: its name, seed, loss function and color."""

    name: str
    seed: int
    loss: Loss
    color: str


def main() -> None:
    """Trains, prints, writes the record and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--commit", help="to write into the record; default: the checkout's")
    parser.add_argument("--plot", type=Path, help="PNG file for the picture")
    options = parser.parse_args()
    element = cce.Spec(filter="element")
    runs = [
        Run("dense, seed 0", 0, dense_loss, "#e8963c"),
        Run("dense, seed 1", 1, dense_loss, "#c9c9c9"),
        Run("cce, filtered and compensated, seed 0", 0, cce_loss(options.backend, element), "#2b5c8a"),
        Run("cce, filtered, not compensated, seed 0", 0, cce_loss(options.backend, replace(element, compensate=False)),
            "#b03a48"),
    ]  # fmt: skip
    demo = Options(text=options.text, steps=options.steps, device=torch.device(options.device))
    size, console = Size(), Console(width=120)
    training, held_out = demo_tokens(demo, size, console)
    found = {}
    for run in runs:
        trained = Training(run.loss, training, replace(demo, seed=run.seed), size)
        for _ in track(range(options.steps), run.name, console=console):
            trained.step()
        found[run.name] = {"losses": trained.losses, **ending(trained, held_out, demo, options.backend)}
    summary = compared(runs, found, options.steps)
    console.print_json(data=summary)
    if options.out:
        curves = {run.name: [round(float(x), 4) for x in smoothed(found[run.name]["losses"])] for run in runs}
        record.write(options.out, options.device, options.commit, **summary, curves=curves)
    if options.plot:
        draw(options.plot, runs, found)


def ending(trained: Training, held_out: torch.Tensor, demo: Options, backend: str) -> dict[str, float]:
    """Held-out loss in float32, and the live fraction there."""
    e, targets = hidden_states(trained.model, held_out, demo.device)
    c = trained.model.head.detach()
    e, c = e.bfloat16(), c.bfloat16()
    live = cce.live_fraction(e, c, targets, spec=cce.Spec(filter="element"), backend=backend)
    return {"held_out": float(F.cross_entropy((e @ c.T).float(), targets)), "live_fraction": live}


def smoothed(losses: list[float]) -> np.ndarray[Any, Any]:
    """Means of WINDOW steps."""
    usable = len(losses) // WINDOW * WINDOW
    return np.asarray(losses[:usable]).reshape(-1, WINDOW).mean(1)


def compared(runs: list[Run], found: dict[str, Any], steps: int) -> dict[str, Any]:
    """How far each curve is from the first, at most and on average."""
    first = smoothed(found[runs[0].name]["losses"])
    rows = []
    for run in runs:
        gap = np.abs(smoothed(found[run.name]["losses"]) - first)
        rows.append(
            {
                "run": run.name,
                "final": float(smoothed(found[run.name]["losses"])[-4:].mean()),
                "held_out": found[run.name]["held_out"],
                "live_fraction": found[run.name]["live_fraction"],
                "largest_gap_to_first": float(gap.max()),
                "mean_gap_to_first": float(gap.mean()),
            }
        )
    return {"steps": steps, "window": WINDOW, "rows": rows}


def draw(path: Path, runs: list[Run], found: dict[str, Any]) -> None:
    """The curves, and their differences to the first."""
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    first = smoothed(found[runs[0].name]["losses"])
    steps = (np.arange(len(first)) + 0.5) * WINDOW
    for run in runs:
        curve = smoothed(found[run.name]["losses"])
        left.plot(steps, curve, color=run.color, label=run.name, linewidth=4 if run is runs[0] else 1.5)
        right.plot(steps, curve - first, color=run.color, linewidth=1.5)
    left.set_title(f"Training loss, means of {WINDOW} steps", loc="left", weight="bold")
    left.set_ylabel("nats per token")
    left.legend(frameon=False)
    right.set_title("Difference to the first dense run", loc="left", weight="bold")
    for axes in (left, right):
        axes.set_xlabel("training step")
        axes.grid(axis="y", color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    main()
