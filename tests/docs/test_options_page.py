"""docs/options.md is what the backends declare, names every option there is, and shows what they refuse."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import cce
from cce import registry
from cce.backends.torch import TorchBackend
from cce.frontend.checks import OUTPUTS, REDUCTIONS
from cce.functional import LOSS_OPTIONS
from cce.spec import FILTERS
from cce.testing.options import OPTIONS
from cce.testing.options_table import options_page

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
BUILT_IN = ["triton", "cupy", "numba", "torch", "reference"]
# Which backend runs it, how it is split, and what is not the backend's to support.
ELSEWHERE = {"backend", "spec", "vocab_parallel"}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == options_page(), "run: python -m cce.testing --options-table > docs/options.md"


def test_no_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is the same with a GPU, without, and with one that is too old."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    assert options_page(BUILT_IN) == PAGE.read_text("utf-8")


def test_every_option_has_a_row() -> None:
    rows = "\n".join(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|"))
    spec = {field.name for field in dataclasses.fields(cce.Spec) if field.init} - {"threshold"}
    values = [f'filter="{name}"' for name in FILTERS] + [f'reduction="{name}"' for name in REDUCTIONS]
    for name in [*(LOSS_OPTIONS - ELSEWHERE), *spec, *OUTPUTS, *values, "bias"]:
        assert re.search(rf"`[^`|]*\b{name}", rows), f"no row has {name}"
    names = [str(option) for options in OPTIONS.values() for option in options]
    assert len(names) == len(set(names)), "two rows have the same name"


def test_a_backend_of_others_gets_a_column() -> None:
    class Narrow(TorchBackend):
        name = "narrow"

        def unsupported(self, problem, spec):
            return [f"softcap={problem.softcap}: none here"] if problem.softcap else []

    cce.register_backend("narrow", Narrow)
    try:
        page = options_page(["narrow", "torch"])
    finally:
        cce.unregister_backend("narrow")
    assert "| | `narrow` | `torch` |" in page
    assert "| `softcap` | [1](#reasons) | ✓ |" in page and "\n1. softcap=3.0: none here\n" in page
    assert "| `bias` | ✓ | ✓ |" in page


def test_reasons_of_the_place_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing on this machine, and what the problem has, are both told."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    e = torch.ones(2, 3, dtype=torch.float64)
    reasons = cce.explain(e, e, torch.tensor([0, 1])).reasons["triton"]
    assert "not on 'cpu'" in reasons[-2] and "float64" in reasons[-1]
    assert registry.load("triton").unavailable("cpu") == reasons[:-1]
