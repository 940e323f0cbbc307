"""Run by test_tuned_interpreted.py, in processes of their own: ``tune`` or ``use``; prints JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import fast_interpreter
import torch
from torch import Tensor

import cce
from cce.backends.triton import choice
from cce.backends.triton.backend import TritonBackend
from cce.backends.triton.launch import Launch, Tile
from cce.tuning import autotune
from cce.tuning.search import Trial

SPECS = {
    "exact": cce.Spec(filter="none"),  # with a softcap, in two passes
    "filtered": cce.Spec(filter="element", block_n=16, block_v=16, threshold=1e-2),
}
FAST, WRONG, FAILS = 32, Tile(64, 64, 32, warps=4, stages=2), Tile(64, 64, 16, warps=4, stages=3)

rng = torch.Generator().manual_seed(0)
e, c = torch.randn(24, 20, generator=rng), torch.randn(70, 20, generator=rng).requires_grad_()
targets = torch.randint(70, (24,), generator=rng)
# The exact backward leaves these rows out: 16 are left, and another key of the cache.
ignored = targets.masked_fill(torch.arange(24) % 3 == 0, -100)
#: Frozen hidden states spare the filtered problem the tiles of dE.
PROBLEMS = {"exact": (e.clone().requires_grad_(), c, ignored), "filtered": (e, c, targets)}


def tune() -> dict[str, Any]:
    """What became of each tile, and the files written."""
    original = TritonBackend.forward

    def forward(*arguments: Any) -> Any:
        found, launch = original(*arguments), choice._imposed.get()
        if launch is not None and launch.forward == FAILS:
            raise RuntimeError("out of\nresource")
        if launch is not None and launch.forward == WRONG:
            found.lse[3] += 1
        return found

    def timer(trial: Trial) -> float:
        trial()
        return trial.tile.columns / FAST  # and in truth, too, other tiles sum in another order

    TritonBackend.forward = forward
    options: dict[str, Any] = {"softcap": 20, "rounds": 1, "timer": timer}
    found = {name: autotune(*PROBLEMS[name], spec=spec, **options) for name, spec in SPECS.items()}
    return {name: [[row.kernel, str(row.tile), row.note] for row in tuned.rows] for name, tuned in found.items()}


def use() -> dict[str, Any]:
    """The tiles of a step's launches, and how far its results are from the reference's."""
    return {name: {"columns": columns(name), "errors": errors(name), "note": note(name)} for name in SPECS}


def note(name: str) -> str:
    return cce.explain(*PROBLEMS[name], backend="triton", spec=SPECS[name], softcap=20.0).note


def step(backend: str, name: str) -> list[Tensor]:
    loss = cce.loss(*PROBLEMS[name], backend=backend, spec=SPECS[name], softcap=20.0)
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in PROBLEMS[name] if x.requires_grad])]


def errors(name: str) -> list[float]:
    pairs = zip(step("triton", name), step("reference", name), strict=True)
    return [float((x - y).norm() / y.norm()) for x, y in pairs]


def columns(name: str) -> list[dict[str, int]]:
    seen: list[Launch] = []
    original = choice.choose
    choice.choose = lambda *arguments: seen.append(original(*arguments)) or seen[-1]
    step("triton", name)
    choice.choose = original
    kernels = ("forward", "dense") if name == "exact" else ("forward", "sparse", "dc")
    return [{name: tile.columns for name, tile in launch.tiles(kernels).items()} for launch in seen]


if __name__ == "__main__":  # pytest looks for doctests here, too
    fast_interpreter.hasten()
    torch.set_num_threads(1)
    print(json.dumps({"tune": tune, "use": use}[sys.argv[1]]()))
