"""The table of docs/options.md: what the backends declare about every option; nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence

from cce import registry
from cce.backends.base import Backend
from cce.backends.resolve import resolve
from cce.testing.options import OPTIONS, Option

_HEAD = """\
<!-- Written by: python -m cce.testing --options-table > docs/options.md -->
# Options and backends

Every option of the public interface on every backend: ✓ works; a number is a refusal, with the reason below the table.
A call that is refused raises `cce.BackendUnavailable` with its reasons, and `backend="auto"` takes the next backend.

The table is written from what the backends declare, and a test compares the two. The
[conformance kit](write-your-own-backend.md#check-it) runs every row on the backend it checks: values and all gradients
against the dense formula in float64, refusals against their reasons. So a cell that says ✓ was computed; for `triton`,
on a machine without a GPU, in Triton's interpreter.

Some reasons depend on sizes; `cce.explain(e, c, targets, ...)` answers for the call at hand, and `python -m cce info`
tells which backends find their packages and hardware on this machine.
"""


def options_page(names: Sequence[str] | None = None) -> str:
    """The page, with a column for each backend called one of ``names`` (all there are)."""
    columns = [registry.load(name) for name in (registry.list_backends() if names is None else names)]
    notes: dict[str, int] = {}
    lines = [
        "| | " + " | ".join(f"`{backend.name}`" for backend in columns) + " |",
        "|---|" + ":-:|" * len(columns),
    ]
    for group, options in OPTIONS.items():
        lines.append(f"| **{group}** |" + " |" * len(columns))
        lines += [f"| {option} | " + " | ".join(_cell(option, b, notes) for b in columns) + " |" for option in options]
    reasons = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([_HEAD, *lines, "", "## Reasons", "", *reasons]) + "\n"


def _cell(option: Option, backend: Backend, notes: dict[str, int]) -> str:
    problem = option.problem(backend.device)
    reasons = backend.unsupported(problem, resolve(option.make_spec(), problem))
    numbers = [notes.setdefault(reason, len(notes) + 1) for reason in reasons]
    return ", ".join(f"[{number}](#reasons)" for number in numbers) or "✓"
