"""A row has a time only if it is right; what cannot run says why; nothing stops the others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest
import torch

import cce
from cce.backends.torch import TorchBackend
from cce.benchmarks import peers, timing
from cce.benchmarks.candidates import MODES, candidates, of_peer
from cce.benchmarks.heads import Head
from cce.benchmarks.measure import PASSES, Effort, Row, Slow, measured
from cce.benchmarks.peers import PEERS, Peer
from cce.functional import LOSS_OPTIONS

FAST = Effort(rounds=2, span_ms=0.1)


class Lossy(TorchBackend):
    """Its gradients are a tenth too large."""

    name = "lossy"

    def one_pass(self, problem, spec):
        return None

    def backward(self, *arguments):
        found = super().backward(*arguments)
        found.de.mul_(1.1)
        return found


class Crashing(TorchBackend):
    """Its backward fails."""

    name = "crashing"

    def one_pass(self, problem, spec):
        return None

    def backward(self, *arguments):
        raise RuntimeError("no such kernel\nin two lines")


@pytest.fixture
def registered() -> Iterator[None]:
    for backend in (Lossy, Crashing):
        cce.register_backend(backend.name, backend)
    yield
    for backend in (Lossy, Crashing):
        cce.unregister_backend(backend.name)


def rows(head: Head, backends: list[str], names: list[str], modes: dict[str, cce.Spec] = MODES) -> list[Row]:
    found = measured(head, candidates(head, backends, modes, names), PASSES, FAST, 1e10)
    return [row for row in found if not isinstance(row, str)]


def by(found: list[Row], name: str, mode: str = "", which: str = PASSES[1]) -> Row:
    (row,) = (row for row in found if (row["name"], row["mode"], row["pass"]) == (name, mode, which))
    return row


def test_rows(small: Head) -> None:
    modes = {name: dataclasses.replace(spec, threshold=2.0**-8) for name, spec in MODES.items()}  # of a small head
    found = rows(small, ["torch", "triton"], ["eager"], modes)
    assert found[0]["name"] == "mm" and found[0]["mm"] == 1.0
    for row in (by(found, "torch", "exact"), by(found, "torch", "filtered"), by(found, "eager")):
        assert row["status"] == "ok" and row["rounds"] == 2
        assert 0 < row["time_low_ms"] <= row["time_ms"] <= row["time_high_ms"]
        assert row["mm"] > 0 and row["roofline"] > 0
        gradients = (small.e.nbytes + small.c.nbytes) / 2**20
        assert row["peak_mib"] - row["over_gradients_mib"] == pytest.approx(gradients)
    exact, filtered, bare = (by(found, "torch", mode) for mode in MODES)
    assert filtered["threshold"] == 2.0**-8 and "threshold" not in exact
    assert exact["live"] == 1.0 and 0 < filtered["live"] == bare["live"] < 1
    assert exact["error_de"] < 1e-5 < filtered["error_de"] < bare["error_de"]
    assert filtered["products"] == pytest.approx(1 + 3 * filtered["live"]) and exact["products"] == 3
    assert by(found, "torch", "exact", "forward")["products"] == 1
    assert len([row for row in found if row["pass"] == "forward"]) == 3, "a forward has no filter: one mode a backend"
    triton = by(found, "triton", "exact")
    assert triton["status"] == "refused" and "CUDA" in triton["reason"] and "time_ms" not in triton


def test_wrong_gradients_have_no_time(small: Head, registered: None) -> None:
    found = rows(small, ["lossy", "crashing"], ["eager"], {"exact": MODES["exact"]})
    wrong, failed = by(found, "lossy", "exact"), by(found, "crashing", "exact")
    assert wrong["status"] == "wrong" and wrong["reason"].startswith("dE errs by 0.1") and "time_ms" not in wrong
    assert wrong["error_dc"] < 1e-5 and "peak_mib" in wrong
    assert failed["status"] == "failed" and failed["reason"] == "RuntimeError: no such kernel in two lines"
    assert by(found, "lossy", "exact", "forward")["status"] == "ok" and by(found, "eager")["status"] == "ok"


def test_peer_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> peers.Loss:
        raise ImportError("symbol not found")

    failed = of_peer(Peer("x", broken, ()))
    assert (failed.status, failed.reason) == ("failed", "ImportError: symbol not found")
    absent = of_peer(Peer("x", broken, (), package="no-such-package"))
    assert absent.status == "absent" and "pip install 'cce-kernels[peers]'" in absent.reason
    older = of_peer(Peer("x", broken, (), _has="no_such_function"))
    assert older.status == "absent" and torch.__version__ in older.reason


@pytest.mark.parametrize("name", ["eager", "torch-chunked"])
def test_peers_of_torch(small: Head, name: str) -> None:
    if PEERS[name].absent():
        pytest.skip(PEERS[name].absent())
    row = by(rows(small, [], [name]), name)
    assert row["status"] == "ok" and row["error_de"] < 1e-4
    assert row["version"] == torch.__version__


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.package])
def test_peers_of_others(small: Head, name: str) -> None:
    """Where they are installed: made, and a failure of theirs is a row."""
    if PEERS[name].absent():
        pytest.skip(PEERS[name].absent())
    row = by(rows(small, [], [name]), name)
    assert row["status"] in ("ok", "wrong", "failed") and (row["status"] == "ok" or row["reason"])


def test_what_peers_lack_are_options_of_ours() -> None:
    known = LOSS_OPTIONS | {"bias", "lse", "entropy", "prediction"}
    for peer in PEERS.values():
        assert set(peer.lacks) <= known and len(set(peer.lacks)) == len(peer.lacks), peer.name


def test_compiled_is_made_anew(small: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the ninth head would be computed without compilation, and nobody would know."""
    called = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: called.append("reset"))
    for _ in range(2):
        assert of_peer(PEERS["compiled"]).loss is not None
    assert called == ["reset", "reset"]


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    e, c = torch.randn(4, 4), torch.randn(4, 4)
    order: list[str] = []

    def run(name: str, seconds: float) -> timing.Run:
        def step() -> None:
            order.append(name)
            time.sleep(seconds)

        return step

    monkeypatch.setattr(timing, "SLOW_MS", {"cpu": 15})
    *_, times = timing.turns({"fast": run("fast", 0.002), "slow": run("slow", 0.02)}, e, c, 3, 0.1)
    assert isinstance(times, dict)
    assert times["fast"].rounds == 3 and times["slow"].rounds == 1
    assert order == ["fast", "slow", "fast", "fast", "fast"], "one that is slow runs once"
    assert 2 <= times["fast"].ms < 15 < times["slow"].ms
    assert times["fast"].ms_low <= times["fast"].ms <= times["fast"].ms_high
    assert times["mm"].mm == times["mm"].low == times["mm"].high == 1


def test_what_is_slow_is_taken_once_and_then_skipped(small: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "peak_and_slow_ms", lambda run, device: (timing.peak_bytes(run, device), 3000.0))
    slow: Slow = {}

    def run() -> list[Row]:
        found = measured(small, candidates(small, ["torch"], {"exact": MODES["exact"]}, []), PASSES, FAST, 1e10, slow)
        return [row for row in found if not isinstance(row, str)]

    first = by(run(), "torch", "exact")
    assert first["time_ms"] == first["time_low_ms"] == 3000 and first["rounds"] == 1
    assert slow == {("torch, exact", name): 3000 for name in PASSES}
    second = by(run(), "torch", "exact")
    assert second["status"] == "skipped" and "3,000 ms" in second["reason"]
    assert "time_ms" not in second and "error_de" not in second


def test_a_step_on_a_gpu_is_timed_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock, after the device has been waited for, and only where that is slow."""
    now, waited = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.torch.accelerator, "synchronize", lambda: waited.append(now[0]))
    monkeypatch.setattr(timing.measure, "peak_bytes", lambda run, device: run() or 77)

    def seconds(count: float) -> timing.Run:
        def run() -> None:
            now[0] += count

        return run

    cuda = torch.device("cuda")
    assert timing.peak_and_slow_ms(seconds(2.0), cuda) == (77, 2000)
    assert timing.peak_and_slow_ms(seconds(0.5), cuda) == (77, None)
    assert waited == [0.0, 2.0, 2.0, 2.5], "once before and once after: no step to warm up"
    assert timing.peak_and_slow_ms(seconds(5.0), torch.device("cpu")) == (77, None)


def test_bandwidth() -> None:
    assert 1e8 < timing.bandwidth(torch.device("cpu")) < 1e13
