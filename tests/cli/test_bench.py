"""``cce bench``: what it measures and writes, and every option that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cce.benchmarks import record, studies, timing
from cce.benchmarks.shapes import Shape
from cce.benchmarks.studies import Options
from cce.cli import bench, main

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--device", "cpu", "--shapes", "24x16x700", "--rounds", "1", "--backends", "torch", "triton"]


@pytest.fixture(scope="module", autouse=True)
def short_sweeps():
    """One threshold, and no cache to be emptied a thousand times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "QUICK_POWERS", (13,))
        patch.setattr(timing, "_CPU_CACHE", 2**12)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a small run, with its picture."""
    path = tmp_path_factory.mktemp("bench") / "found.jsonl"
    argv = ["bench", *TINY, "--peers", "eager", "--studies", "heads", "filter", "--quick", "--commit", "abc"]
    assert main([*argv, "--out", str(path)]) == 0
    return path


def test_record(written: Path) -> None:
    found = record.read(written)
    assert found.facts["commit"] == "abc" and found.facts["versions"]["torch"] == str(torch.__version__)
    assert found.facts["threads"] == torch.get_num_threads()
    (data,) = [row for row in found.of("heads") if row["kind"] == "data"]
    assert data["status"] == "ok" and data["entropy"] > 0 and data["data"] == "synthetic"
    timed = {(row["name"], row["mode"], row["pass"]): row for row in found.of("heads") if row["kind"] == "time"}
    step = "forward+backward"
    assert set(timed) == {
        ("mm", "", "e @ c.T"),
        ("eager", "", "forward"),
        ("eager", "", step),
        *((name, "exact", "forward") for name in ("torch", "triton")),
        *((name, mode, step) for name in ("torch", "triton") for mode in ("exact", "filtered")),
    }
    assert timed["torch", "filtered", step]["time_ms"] > 0
    assert timed["triton", "exact", step]["status"] == "refused"
    assert len([row for row in found.of("filter") if row["kind"] == "time"]) == 2 + 4 * len(studies.QUICK_POWERS)
    assert found.rows[-1]["seconds"] > 0


def test_pictures_come_from_the_record_alone(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {path.name: path.read_bytes() for path in written.parent.glob("*.svg")}
    assert set(made) == {"found-heads-synthetic.svg", "found-filter-synthetic.svg"}
    capsys.readouterr()
    assert main(["bench", "--plot", str(written), "--pictures", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == made, "the same bytes again"
    for expected in ("torch, filtered, step", "eager, forward", "triton refused: ", "N=24 D=16 V=700", "commit abc"):
        assert expected in printed
    assert main(["bench", "--plot", str(written), "--pictures", str(tmp_path), "--png"]) == 0
    assert (tmp_path / "found-heads-synthetic.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_is_there_as_soon_as_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "x.jsonl", []

    def cut_short(options: Options):
        yield {"study": "heads", "kind": "time", "x": 1.23456789}
        seen.append(path.read_text().splitlines())
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "run", cut_short)
    assert main(["bench", *TINY, "--out", str(path)]) == 130
    assert json.loads(seen[0][1]) == {"study": "heads", "kind": "time", "x": 1.2346}


def test_scaling_study_rows() -> None:
    options = Options(torch.device("cpu"), torch.float32, (), studies=("vocabulary", "tokens", "width"))
    for kind in ("cpu", "cuda"):
        for study, (fixed, sizes) in studies.SCALING[kind].items():
            assert getattr(fixed, fixed.name.lower()) == 0, f"{study} varies {fixed.name}"
            assert list(sizes) == sorted(set(sizes))
    vocabulary = [job for job in studies.jobs(options) if job.study == "vocabulary"]
    assert [job.shape.v for job in vocabulary] == [8192, 32_768, 131_072, 524_288, 1_048_576]
    assert all(job.specs.keys() == {"exact", "filtered"} and job.backends[0] == "torch" for job in vocabulary)
    assert "reference" not in vocabulary[0].backends and "triton" not in vocabulary[0].backends


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files as ``bench/train_lm.py`` (with facts) and the demo write them."""
    folder = tmp_path_factory.mktemp("states")
    rng = torch.Generator().manual_seed(0)
    for name in ("base", "demo"):
        e, c = (torch.randn(size, 4, generator=rng) for size in (8, 300))
        kept = {"e": e, "c": c, "targets": torch.arange(8), "unigram_counts": torch.arange(300, 0, -1)}
        facts = {"held_out_loss": 3.5, "steps": 7, "packages": "x" * 1000}
        torch.save({**kept, "facts": facts} if name == "base" else kept, folder / f"{name}.pt")
    return [str(folder / f"{name}.pt") for name in ("base", "demo")]


def test_trained_heads_are_extended(states: list[str]) -> None:
    options = bench.options(_parsed(["--trained", *states, *TINY]))
    assert options.data == ("synthetic", "trained-base", "trained-demo")
    head = studies.make_head("trained-base", Shape("x", 12, 8, 400), options)
    assert head.e.shape == (12, 8) and head.c.shape == (400, 8) and head.e.dtype == torch.float32
    with pytest.raises(ValueError, match="only extended"):
        studies.make_head("trained-base", Shape("x", 12, 2, 400), options)
    other = studies.make_head("trained-demo", Shape("x", 12, 8, 400), options)
    assert not torch.equal(other.c, head.c)


def test_rows_say_of_which_state_they_are(states: list[str], tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    argv = ["--trained", *states, "--data", "trained", *TINY, "--peers", "--modes", "filtered"]
    assert main(["bench", *argv, "--studies", "heads", "filter", "--quick", "--out", str(path)]) == 0
    found = record.read(path)
    for study in ("heads", "filter"):
        rows = found.of(study)
        assert {row["data"] for row in rows} == {"trained-base", "trained-demo"}
        assert len([row for row in rows if row["kind"] == "data" and row["entropy"] > 0]) == 2
    assert found.facts["trained"] == {"trained-base": {"held_out_loss": 3.5, "steps": 7}, "trained-demo": {}}
    assert {x.name for x in tmp_path.glob("*-base.svg")} == {f"found-{x}-trained-base.svg" for x in ("heads", "filter")}


def test_what_is_slow_is_skipped_on_other_data_and_larger_sizes(
    states: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SLOW_MS", {"cpu": 0})
    fixed, _ = studies.SCALING["cpu"]["width"]
    monkeypatch.setitem(studies.SCALING["cpu"], "width", (fixed, (8, 16)))
    argv = [*TINY, "--shapes", "24x16x700", "24x16x800", "--studies", "heads", "width", "--trained", states[0]]
    argv += ["--modes", "exact", "--passes", "forward+backward", "--peers", "--backends", "torch"]
    rows = [row for row in studies.run(bench.options(_parsed(argv))) if not isinstance(row, str)]
    found = [
        (row["study"], row["v"], row["d"], row["data"], row["status"]) for row in rows if row.get("name") == "torch"
    ]
    assert found == [
        ("heads", 700, 16, "synthetic", "ok"),
        ("heads", 700, 16, "trained-base", "skipped"),
        ("heads", 800, 16, "synthetic", "ok"),
        ("heads", 800, 16, "trained-base", "skipped"),
        ("width", 32_768, 8, "synthetic", "ok"),
        ("width", 32_768, 16, "synthetic", "skipped"),
    ]


def test_sweeps_take_fewer_rounds_unless_told() -> None:
    usual, told = (bench.options(_parsed(["--device", "cpu", *more])) for more in ([], ["--rounds", "7"]))
    assert usual.effort.rounds == 5 and usual.sweep_effort.rounds == 3
    assert told.effort.rounds == told.sweep_effort.rounds == 7


def test_defaults_of_a_gpu_and_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = bench.options(_parsed(["--device", "cpu"]))
    assert cpu.dtype == torch.float32 and cpu.data == ("synthetic",) and len(cpu.shapes) == 2
    monkeypatch.setattr(bench, "usable_device", torch.device)
    gpu = bench.options(_parsed(["--device", "cuda"]))
    assert gpu.dtype == torch.bfloat16 and gpu.data == ("random", "synthetic")
    assert [shape.v for shape in gpu.shapes] == [256_000, 128_256, 151_936]
    quick = bench.options(_parsed(["--device", "cuda", "--quick"]))
    assert len(quick.shapes) == 1 and quick.modes == ("exact", "filtered") and len(gpu.modes) == 3
    assert len(bench.options(_parsed(["--device", "cuda", "--shapes", "all"])).shapes) > 50


def _parsed(argv: list[str]):
    import argparse

    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *argv])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shapes", "gpt3:256"], "--shapes: got 'gpt3:256', expected MODEL:N or NxDxV"),
        (["--backends", "torch", "tensorflow"], "--backends: got 'tensorflow', expected some of "),
        (["--modes", "fast"], "--modes: got 'fast', expected some of exact, filtered, uncompensated"),
        (["--peers", "quack"], "--peers: got 'quack', expected some of eager, compiled"),
        (["--passes", "backward"], "--passes: got 'backward', expected some of forward, forward+backward"),
        (["--studies", "depth"], "--studies: got 'depth', expected some of heads, vocabulary"),
        (["--data", "trained"], "--data: got 'trained' without --trained PATH"),
        (["--trained", "/no/such.pt"], "--trained: got '/no/such.pt', expected a file that can be read"),
        (
            ["--trained", __file__, "--data", "random"],
            "--trained: got files, expected 'trained' among --data",
        ),
        (["--trained", __file__, __file__], "expected files of different names"),
        (["--rounds", "0"], "--rounds: got '0', expected a whole number"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--device", "tpu0"], "--device: got 'tpu0', expected one that works here"),
        (["--out", "found.json"], "--out: got 'found.json', expected a file name that ends in .jsonl"),
        (["--plot", "/no/such.jsonl"], "--plot: "),
    ],
)
def test_bad_options(fails: Callable[..., str], argv: list[str], said: str) -> None:
    assert said in fails("bench", *(["--device", "cpu"] if "--device" not in argv else []), *argv)


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", "no json\n", '{"record": "other"}\n'])
def test_not_a_record(fails: Callable[..., str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert "expected JSON lines written by cce bench --out" in fails("bench", "--plot", str(path))
