"""The tuner's choice, with a fake GPU that takes the time it is told to; and what autotune refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cce
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.backends.triton.launch import Device, Launch, Tile, fitted, shipped
from cce.spec import Spec
from cce.tuning import autotune
from cce.tuning.candidates import candidates, kernels_of
from cce.tuning.phases import difference
from cce.tuning.prepare import EventTimer
from cce.tuning.search import Row, Trial, Tuned, tune

DEVICE = Device("A GPU", (9, 0), 132, "ieee")
PROBLEM = Problem(
    n=8192, v=32_000, d=2304, e_dtype=torch.bfloat16, c_dtype=torch.bfloat16, device="cuda", grad_e=True, grad_c=True
)
EXACT, FILTERED = (resolve(Spec(filter=name), PROBLEM) for name in ("none", "element"))


@dataclass
class FakeGPU:
    """Runs anything in the time ``ms`` says.

    Attributes:
        ms: (kernel, launch, how often it was timed before) -> milliseconds.
        faults: of launches.
        timed: all trials, in order.
    """

    ms: Callable[[str, Launch, int], float]
    faults: Callable[[Launch], str | None] = lambda launch: None
    timed: list[Trial] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def run(self, kernel: str, launch: Launch) -> None:
        self.ran.append(kernel)

    def fault(self, launch: Launch) -> str | None:
        return self.faults(launch)

    def timer(self, trial: Trial) -> float:
        trial()
        self.timed.append(trial)
        return self.ms(trial.kernel, trial.launch, sum(other == trial for other in self.timed) - 1)

    def tune(self, spec: Spec = EXACT, rounds: int = 3, **options: Any) -> tuple[Launch, tuple[Row, ...]]:
        launch = shipped(PROBLEM, spec, DEVICE)
        return tune(self, launch, PROBLEM, spec, DEVICE, self.timer, rounds, **options)


def rows_of(rows: tuple[Row, ...], kernel: str) -> list[Row]:
    return [row for row in rows if row.kernel == kernel]


def test_the_fastest_is_chosen() -> None:
    best = {"forward": Tile(128, 128, 64, warps=4, stages=3), "dense": Tile(64, 256, 64, warps=4, stages=3)}
    gpu = FakeGPU(lambda kernel, launch, n: 1.0 if getattr(launch, kernel) == best[kernel] else 2.0)
    launch, rows = gpu.tune()
    assert launch == replace(shipped(PROBLEM, EXACT, DEVICE).with_tiles(best), tuned=True)
    for kernel, tile in best.items():
        (chosen,) = (row for row in rows_of(rows, kernel) if "chosen" in row.note)
        assert (chosen.tile, chosen.ms, chosen.ratio) == (tile, 1.0, 0.5)
        assert rows_of(rows, kernel)[0].note == "shipped"
    # What is tuned first is in place when the next is timed.
    assert all(trial.launch.forward == best["forward"] for trial in gpu.timed if trial.kernel == "dense")


@pytest.mark.parametrize("spec", [EXACT, FILTERED], ids=["exact", "filtered"])
def test_every_kernel_and_candidate_takes_its_turn(spec: Spec) -> None:
    gpu = FakeGPU(lambda kernel, launch, n: 1.0)
    launch, rows = gpu.tune(spec, rounds=2)
    assert launch == replace(shipped(PROBLEM, spec, DEVICE), tuned=True)
    kernels = kernels_of(PROBLEM, spec)
    assert list(dict.fromkeys(gpu.ran)) == list(kernels)
    for kernel in kernels:
        found = candidates(kernel, launch, PROBLEM, spec, DEVICE)
        trials = [getattr(trial.launch, kernel) for trial in gpu.timed if trial.kernel == kernel]
        assert trials == 2 * [getattr(launch, kernel), *found]  # one after the other, not each twice
        assert [row.tile for row in rows_of(rows, kernel)] == trials[: len(trials) // 2]


def test_a_small_gain_is_noise() -> None:
    gain = 0.0

    def ms(kernel: str, launch: Launch, n: int) -> float:
        return 1.0 if getattr(launch, kernel) == getattr(base, kernel) else 1.0 - gain

    base = shipped(PROBLEM, EXACT, DEVICE)
    for gain, kept in ((0.01, True), (0.03, False)):  # noqa: B007  # read by ms
        launch, rows = FakeGPU(ms).tune()
        assert (launch.forward == base.forward) is kept
        assert rows_of(rows, "forward")[0].note == ("shipped, chosen" if kept else "shipped")


def test_rounds_are_compared_with_their_own_clock() -> None:
    """The card slows down from round to round; a candidate that ran while it was fast has not won."""
    fast = Tile(128, 128, 64, warps=4, stages=3)

    def ms(kernel: str, launch: Launch, n: int) -> float:
        clock = 10.0**n
        # In one round of five, something else slows it down.
        return clock * (0.9 if launch.forward == fast else 1.0) * (5.0 if launch.forward == fast and n == 2 else 1.0)

    launch, rows = FakeGPU(ms).tune(rounds=5)
    assert launch.forward == fast
    (row,) = (row for row in rows_of(rows, "forward") if row.tile == fast)
    assert row.ratio == pytest.approx(0.9)


def test_faults_are_left_out_and_told() -> None:
    wrong = Tile(128, 128, 64, warps=4, stages=3)
    second = Tile(64, 256, 64, warps=4, stages=3)

    def ms(kernel: str, launch: Launch, n: int) -> float:
        return {wrong: 0.1, second: 0.5}.get(getattr(launch, kernel), 1.0)

    def fault(launch: Launch) -> str | None:
        return "dc differs by 1.0e+00" if wrong in (launch.forward, launch.dense) else None

    gpu = FakeGPU(ms, fault)
    launch, rows = gpu.tune()
    assert launch.forward == launch.dense == second
    assert not any(wrong in (trial.launch.forward, trial.launch.dense) for trial in gpu.timed)
    left_out = [row for row in rows if row.tile == wrong]
    assert [(row.kernel, row.ms, row.ratio, row.note) for row in left_out] == [
        (kernel, None, None, "dc differs by 1.0e+00") for kernel in ("forward", "dense")
    ]


def test_all_candidates_fail() -> None:
    launch, rows = FakeGPU(lambda *_: 1.0, lambda launch: "out of resource").tune()
    assert launch == replace(shipped(PROBLEM, EXACT, DEVICE), tuned=True)
    assert {row.note for row in rows} == {"shipped, chosen", "out of resource"}


def test_products_share_their_warps() -> None:
    wide = replace(PROBLEM, e_dtype=torch.float32, c_dtype=torch.float32)
    device = replace(DEVICE, precision="tf32")
    spec = resolve(Spec(filter="element"), wide)

    def ms(kernel: str, launch: Launch, n: int) -> float:
        return 1.0 if kernel != "dc" or launch.dc.warps != 4 else 0.5

    gpu = FakeGPU(ms)
    launch, _ = tune(gpu, shipped(wide, spec, device), wide, spec, device, gpu.timer, 1)
    assert launch.de.warps == launch.dc.warps == 4
    assert fitted(launch, wide, spec) == launch


def test_progress() -> None:
    told: list[tuple[int, int, str]] = []
    FakeGPU(lambda *_: 1.0).tune(rounds=2, progress=lambda *step: told.append(step))
    total = told[0][1]
    assert [done for done, _, _ in told] == list(range(total + 1))
    assert {total for _, total, _ in told} == {total}
    whats = list(dict.fromkeys(what.partition(" t")[0] for _, _, what in told))
    assert whats == ["forward: checking", "forward: timing".partition(" t")[0], "dense: checking", "dense:", "done"]


def test_table() -> None:
    tile = Tile(128, 256, 64, stages=3, flatten=True)
    rows = (Row("forward", tile, 1.5, 1.0, "shipped"), Row("dense", tile, None, None, "spills"))
    text = str(Tuned(shipped(PROBLEM, EXACT, DEVICE), rows, Path("there.json")))
    assert "forward  128 x 256 x 64, 8 warps, 3 stages, flat" in text
    assert "1.500  1.000  shipped" in text and text.count("–") == 2 and "there.json" in text


def test_difference() -> None:
    x = torch.randn(10_000, 3)
    assert difference(x, x, x) == 0.0
    assert difference(1.5 * x, x, x) == pytest.approx(0.5)
    assert difference(1.5 * x, x, 10 * x) == pytest.approx(0.05)
    assert difference(torch.zeros(5), torch.zeros(5), torch.zeros(5)) == 0.0
    assert difference(torch.ones(5), torch.zeros(5), torch.zeros(5)) > 1e300
    y = x.clone()
    y[9_999, 2] = torch.nan
    assert not difference(y, x, x) <= 1.0
    y[9_999, 2] = x[9_999, 2] + 10 * x.norm()
    assert difference(y, x, x) == pytest.approx(10)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CCE_TUNE_CACHE", str(tmp_path / "launch"))
    yield tmp_path / "launch"
    assert not list((tmp_path / "launch").glob("*"))  # nothing is kept of a call that fails


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "rounds: got 0, expected an int >= 1"),
        ({"rounds": 1.5}, TypeError, "rounds: got 1.5 of type float"),
        ({"rounds": True}, TypeError, "rounds: got True of type bool"),
        ({"timer": 3}, TypeError, "timer: got 3 of type int, expected a callable"),
        ({"progress": "bar"}, TypeError, "progress: got 'bar' of type str, expected a callable"),
        ({"spec": "exact"}, TypeError, "spec: got 'exact'"),
        ({"outputs": ("loss",)}, ValueError, r"outputs: got \('loss',\)"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
        ({"temperature": 2.0}, TypeError, "temperature: got 2.0, expected an option of cce.loss"),
        ({"c": torch.zeros(7, 5)}, ValueError, "e: got shape"),
        ({"targets": torch.zeros(3)}, TypeError, "targets: got dtype torch.float32"),
        ({}, cce.BackendUnavailable, "runs on CUDA devices"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "e": torch.zeros(3, 4),
        "c": torch.zeros(7, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
        **options,
    }
    with pytest.raises(error, match=message):
        autotune(**arguments)


def test_the_result_must_have_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCE_TUNE_CACHE", "OFF")
    with pytest.raises(ValueError, match="CCE_TUNE_CACHE: got 'OFF'"):
        autotune(torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64))


class Counting(EventTimer):
    """A timer that takes 4 ms for each step, and counts them."""

    def __init__(self, span_ms: float) -> None:
        super().__init__(torch.device("cpu"), span_ms)
        self.asked: list[int] = []

    def _measure(self, trial: Trial, steps: int) -> float:
        self.asked.append(steps)
        return 4.0


@pytest.mark.parametrize(("span", "steps"), [(60, 15), (1, 1), (10**6, 1000)])
def test_all_trials_of_a_kernel_take_as_many_steps(span: float, steps: int) -> None:
    timer, launch = Counting(span), shipped(PROBLEM, EXACT, DEVICE)
    gpu = FakeGPU(lambda *_: 1.0)
    for _ in range(3):
        assert timer(Trial(gpu, "forward", launch)) == 4.0
    assert timer.asked == [1, 2, steps, steps, steps]
