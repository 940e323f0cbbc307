"""A bfloat16 training step of each family of transformers' models on a GPU, patched, for each backend.

python tests/gpu/families.py --backends triton cupy numba --out docs/conformance/families-h100.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))  # as pytest has it

import torch
from rich.console import Console
from rich.table import Table
from tiny_models import FAMILIES, error, make_batch, make_model
from torch import Tensor

import cce
from cce.integrations.transformers import patch
from cce.testing.report import environment

#: A vocabulary of several tiles, none of which is whole; more rows than one block of them has.
SIZES: dict[str, Any] = {"vocab_size": 5003}
ROWS = 24
SPECS = {"exact": cce.Spec(filter="none"), "filtered": cce.Spec(filter="element")}


class Step(NamedTuple):
    """Of one training step: the loss, all gradients as one vector, and the head's."""

    loss: float
    gradient: Tensor
    head: Tensor


def compared(family: str, backend: str, mode: str) -> dict[str, Any]:
    """Errors of the patched and of the model's own bfloat16 step against its float32 step."""
    model = make_model(family, **SIZES).bfloat16().cuda()
    dense = step(model)
    found = step(patch(model, backend=backend, spec=SPECS[mode]))
    exact = step(make_model(family, **SIZES).bfloat16().cuda().float())
    return {
        "family": family,
        "backend": backend,
        "mode": mode,
        "loss": abs(found.loss - exact.loss) / exact.loss,
        "dense_loss": abs(dense.loss - exact.loss) / exact.loss,
        "gradients": error(found.gradient, exact.gradient),
        "dense_gradients": error(dense.gradient, exact.gradient),
        "head": error(found.head, exact.head),
        "dense_head": error(dense.head, exact.head),
    }


def within(row: dict[str, Any]) -> bool:
    """At most twice the errors of the model's own bfloat16 step, and a rounding of the loss."""
    return (
        row["loss"] <= 2 * row["dense_loss"] + 2**-8
        and row["gradients"] <= 2 * row["dense_gradients"]
        and row["head"] <= 2 * row["dense_head"]
    )


def step(model: torch.nn.Module) -> Step:
    batch = {name: x.cuda() for name, x in make_batch(ROWS).items()}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    head = next(g for g in reversed(gradients) if g.shape[:1] == (SIZES["vocab_size"],))
    return Step(float(loss.detach()), torch.cat([g.flatten() for g in gradients]), head)


def main() -> None:
    """Prints a table, writes the record; fails if a step is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["triton", "cupy", "numba"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--commit", default="", help="to write into the record")
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    options = parser.parse_args()
    rows = []
    for family in options.families:
        for backend in options.backends:
            for mode in SPECS:
                try:
                    row = compared(family, backend, mode)
                    row["passed"] = within(row)
                except Exception as failure:  # is a row, too, and costs no other
                    row = {"family": family, "backend": backend, "mode": mode, "passed": False, "failed": repr(failure)}
                rows.append(row)
    show(rows)
    if options.out:
        facts = {**environment("cuda"), "commit": options.commit, "sizes": SIZES}
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} steps within the bounds")
    raise SystemExit(bool(failed))


def show(rows: list[dict[str, Any]]) -> None:
    names = ("family", "backend", "mode", "loss", "dense_loss", "gradients", "dense_gradients", "head", "dense_head")
    table = Table(*names, "")
    for row in rows:
        cells = [f"{x:.2e}" if isinstance(x := row.get(name, ""), float) else str(x) for name in names]
        table.add_row(*cells, "" if row["passed"] else row.get("failed", "out of bounds")[:60])
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
