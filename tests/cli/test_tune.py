"""``cce tune``: options reach the tuner, its result is shown; wrong calls end with one line."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import cce
from cce import tuning as package
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.backends.triton.launch import Device, Tile, shipped
from cce.cli import main, tune
from cce.tuning.search import Row, Tuned

SIZES = ["--n", "32", "--d", "16", "--v", "5000"]
PROBLEM = Problem(n=32, v=5000, d=16)
LAUNCH = shipped(PROBLEM, resolve(cce.Spec(), PROBLEM), Device("A GPU", (9, 0), 132, "ieee"))
ROWS = (
    Row("forward", LAUNCH.forward, 1.5, 1.0, "shipped"),
    Row("forward", Tile(128, 128, 32), 0.75, 0.5, "chosen"),
    Row("dense", Tile(256, 256, 32), None, None, "OutOfResources: [shared] memory"),
)


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In the place of the real one, on a CPU that passes for a GPU; returns what it was called with."""
    seen: list[dict[str, Any]] = []

    def autotune(e: Any, c: Any, targets: Any, bias: Any, *, progress: Any, **options: Any) -> Tuned:
        seen.append({"e": e, "c": c, "targets": targets, "bias": bias, **options})
        if progress is not None:
            progress(0, 2, "forward: checking")
            progress(2, 2, "done")
        if options["rounds"] == 99:
            raise ValueError("CCE_TUNE_CACHE: got 'off',\nexpected a folder")
        if options["rounds"] == 98:
            raise cce.BackendUnavailable("backend 'triton' cannot run this:\n  scratch_bytes")
        if options["rounds"] == 97:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Tuned(LAUNCH, ROWS, Path("folder/file.json"))

    monkeypatch.setattr(package, "autotune", autotune)
    monkeypatch.setattr(tune, "timed_device", lambda text, dtype, spec: torch.device("cpu"))
    return seen


@pytest.mark.parametrize("rich", [True, False])
def test_shows_what_was_found(
    rich: bool, tuner: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(tune, "find_spec", find_spec if rich else lambda name: None)
    assert main(["tune", *SIZES]) == 0
    out, _ = capsys.readouterr()
    assert ("─" in out) == rich
    for expected in (str(LAUNCH.forward), "128 x 128 x 32", "1.500", "0.500", "chosen", "[shared] memory", "file.json"):
        assert expected in out
    assert len(tuner) == 1


def test_options_reach_the_tuner(tuner: list[dict[str, Any]]) -> None:
    assert main(["tune", *SIZES]) == 0
    all_of_them = "--dtype float16 --filter tile --vocab-order natural --bias --softcap 30 --entropy --rounds 3"
    assert main(["tune", *SIZES, *all_of_them.split()]) == 0
    plain, full = tuner
    assert (plain["bias"], plain["softcap"], plain["outputs"], plain["rounds"]) == (None, None, (), 5)
    assert (plain["spec"], plain["e"].dtype) == (cce.Spec(), torch.bfloat16)
    assert (full["softcap"], full["outputs"], full["rounds"]) == (30.0, ("entropy",), 3)
    assert full["spec"] == cce.Spec(filter="tile", vocab_order="natural")
    assert full["bias"].requires_grad and full["bias"].shape == (5000,)
    for name, shape in (("e", (32, 16)), ("c", (5000, 16))):
        assert full[name].shape == shape and full[name].dtype == torch.float16 and full[name].requires_grad


def test_head_is_peaked() -> None:
    """A filter leaves a part of the tiles: neither all of them nor none."""
    e, c, targets = tune.head(256, 64, 9000, torch.float32, torch.device("cpu"))
    assert targets.min() >= 0 and targets.max() < 9000
    spec = cce.Spec(filter="element", block_n=32, block_v=32, threshold=2**-10)
    assert 0.01 < cce.live_fraction(e, c, targets, spec=spec) < 0.6


Fails = Callable[..., str]


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ([], ["--n", "--d", "--v"]),
        (SIZES[:4], ["--v"]),
        ([*SIZES, "--n", "0"], ["--n", "'0'", "at least 1"]),
        ([*SIZES, "--d", "wide"], ["--d", "'wide'", "whole number"]),
        ([*SIZES, "--v", str(2**31)], ["--v", str(2**31), "at most"]),
        ([*SIZES, "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        ([*SIZES, "--dtype", "float64"], ["--dtype", "'float64'", "bfloat16"]),
        ([*SIZES, "--filter", "some"], ["--filter", "'some'", "element"]),
        ([*SIZES, "--vocab-order", "random"], ["--vocab-order", "'random'", "natural"]),
        ([*SIZES, "--softcap", "0"], ["--softcap", "'0'", "number > 0"]),
        ([*SIZES, "--softcap", "nan"], ["--softcap", "'nan'", "number > 0"]),
        ([*SIZES, "--softcap", "soft"], ["--softcap", "'soft'", "number > 0"]),
        ([*SIZES, "--rounds", "0"], ["--rounds", "'0'", "at least 1"]),
        ([*SIZES, "--device", "abacus"], ["--device", "'abacus'", "cpu"]),
        ([*SIZES, "--device", "cpu"], ["--device", "'cpu'", "expected a CUDA device"]),
    ],
)
def test_option(argv: list[str], fragments: list[str], fails: Fails) -> None:
    line = fails("tune", *argv)
    assert all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ("99", "CCE_TUNE_CACHE: got 'off', expected a folder"),
        ("98", "backend 'triton' cannot run this: scratch_bytes"),
        ("97", "--n, --d, --v: got 32, 16, 5000, which do not fit into the memory of cpu"),
    ],
)
@pytest.mark.usefixtures("tuner")
def test_what_the_tuner_refuses(rounds: str, message: str, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "find_spec", lambda name: None)  # a bar would be on stdout
    assert message in fails("tune", *SIZES, "--rounds", rounds)
