"""Random calls of the whole public surface against their float64 definitions.

``python tests/fuzz/run.py --backend torch reference --calls 20000 --seed 0 --record docs/conformance/fuzz-cpu.json``;
a failure is found again by ``--seed S --index I``, and what is left of it by ``--plan '{...}'``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import simulated  # noqa: F401  before any kernel is made
import torch
from call import FILTERED, Outcome, run
from plan import Limits, Plan, draw
from shrink import shrink

from cce.testing.report import environment

ROOT = Path(__file__).parents[2]

#: Sizes by where a call runs: interpreters and simulators have two row blocks at most and some vocabulary blocks, the
#: last of each ragged, so that a call takes half a second; GPUs are for whole tiles.
LIMITS = {
    "torch": Limits(),
    "reference": Limits(),
    "triton": Limits(n=18, d=20, v=70, kernels=True),
    "numba": Limits(n=18, d=8, v=40, kernels=True, blocks=(16, 32)),
    "cupy": Limits(kernels=True),
}
ON_A_GPU = Limits(n=300, d=200, v=2100, kernels=True)


def limits_of(backend: str, device: str, variants: int) -> Limits:
    return replace(LIMITS.get(backend, Limits()) if device == "cpu" else ON_A_GPU, variants=variants)


@dataclass
class Tally:
    """What became of the calls of one backend.

    Attributes:
        first: index of the first call.
        tried: calls made, those refused included.
        refused: how often by which reason, numbers left out.
        failures: reproducer, what is wrong, and the smallest plan found.
    """

    backend: str
    device: str
    seed: int
    variants: int = 0
    first: int = 0
    tried: int = 0
    refused: dict[str, int] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        refused = sum(self.refused.values())
        return (
            f"fuzz {self.backend} on {self.device}: seed {self.seed} from {self.first} on, {self.tried} calls, "
            f"{refused} refused, "
            f"{len(self.failures)} failed, {self.seconds:.0f} s"
        )


def reasons(text: str) -> list[str]:
    """The reasons of a refusal, without their numbers and without the backend's name."""
    return [re.sub(r"\d+", "#", reason) for reason in re.findall(r"^  \w+: (.*)$", text, re.MULTILINE)]


def documented() -> set[str]:
    """The reasons docs/options.md lists, and the ValueError of a filter."""
    text = (ROOT / "docs" / "options.md").read_text().partition("## Reasons")[2]
    listed = {re.sub(r"\d+", "#", re.sub(r"^\d+\. ", "", line)) for line in text.splitlines() if line.strip()}
    return listed | {FILTERED}


def judged(plan: Plan, backend: str, device: str) -> Outcome:
    """What became of a call; a refusal that is not documented is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's and the recipes', of NaN and of single numbers
        outcome = run(plan, backend, device)
    strange = set(reasons(outcome.refused)) - documented() if outcome.refused else set()
    return Outcome([f"refused: {reason}" for reason in sorted(strange)]) if strange else outcome


def fuzz(
    backend: str,
    device: str = "cpu",
    *,
    seed: int = 0,
    calls: int = 10**9,
    seconds: float = float("inf"),
    variants: int = 0,
    first: int = 0,
    smallest: bool = True,
    say: Callable[[str], None] = print,
) -> Tally:
    """Makes the calls ``first``, ``first + 1``, ... of ``seed``, until there are enough or time is over."""
    limits = limits_of(backend, device, variants)
    tally = Tally(backend, device, seed, variants, first)
    start = time.monotonic()
    for index in range(first, first + calls):
        if time.monotonic() - start > seconds:
            break
        plan = draw(seed, index, limits)
        outcome = judged(plan, backend, device)
        tally.tried += 1
        tally.refused.update(reasons(outcome.refused)[:1])
        if not outcome.failures:
            continue
        again = f"--backend {backend} --device {device} --seed {seed} --index {index}"
        again += f" --variants {variants}" if variants else ""
        say(f"python tests/fuzz/run.py {again}  # {plan.call}: {'; '.join(outcome.failures)[:600]}")
        if smallest:
            plan = shrink(plan, lambda x: judged(x, backend, device).failures)
            outcome = judged(plan, backend, device)
            say(f"  smaller: --backend {backend} --device {device} --plan '{plan.to_json()}'  # {outcome.failures[:1]}")
        tally.failures.append({"again": again, "failures": outcome.failures, "plan": plan.to_json()})
    tally.seconds = time.monotonic() - start
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", nargs="+", default=["torch"], choices=list(LIMITS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="this call alone")
    parser.add_argument("--first", type=int, default=0, help="index of the first call")
    parser.add_argument("--plan", help="this call alone, as JSON")
    parser.add_argument("--calls", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each backend")
    parser.add_argument("--variants", type=int, default=0, help="of kernels to be compiled; 0 for one a call")
    parser.add_argument("--as-found", action="store_true", help="do not look for smaller calls that fail")
    parser.add_argument("--record", type=Path, help="a file of runs, to which these are added")
    a = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if a.plan is not None or a.index is not None:
        return _once(a)
    if a.calls == 10**9 and a.seconds == float("inf"):
        parser.error("--calls or --seconds: got neither, expected one")
    tallies, place = [], _place(a.device)
    for backend in a.backend:
        tallies.append(
            fuzz(
                backend, a.device, seed=a.seed, calls=a.calls, seconds=a.seconds, variants=a.variants, first=a.first,
                smallest=not a.as_found, say=lambda text: print(text, flush=True),
            )
        )  # fmt: skip
        print(tallies[-1], flush=True)
        for reason, count in sorted(tallies[-1].refused.items()):
            print(f"  {count} refused: {reason}")
    if a.record is not None:
        runs = json.loads(a.record.read_text())["runs"] if a.record.exists() else []
        runs += [{**place, **asdict(replace(tally, refused=dict(tally.refused)))} for tally in tallies]
        a.record.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    return int(any(tally.failures for tally in tallies))


def _place(device: str) -> dict[str, Any]:
    """Machine, versions and commit of a run; asked before it starts, as the checkout may change."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {**environment(device), "date": f"{date.today()}", "commit": commit.strip()}


def _once(a: argparse.Namespace) -> int:
    failed = 0
    for backend in a.backend:
        limits = limits_of(backend, a.device, a.variants)
        plan = Plan.from_json(a.plan) if a.plan is not None else draw(a.seed, a.index, limits)
        outcome = judged(plan, backend, a.device)
        print(f"{plan.to_json()}\n{backend}: {outcome.refused or outcome.failures or 'passed'}")
        failed |= bool(outcome.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
