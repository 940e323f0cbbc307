"""The demo: its parts one by one, and a whole run of a tiny model."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

import cce
from cce.cli import demo as command
from cce.cli import main
from cce.demo import evaluate, measure, run, tokens
from cce.demo.config import Options, Size
from cce.demo.model import LanguageModel
from cce.demo.text import read_corpus
from cce.demo.train import Training, cce_loss, dense_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_whole_run(tiny: Size, text: Path, tmp_path: Path, suffix: str) -> None:
    options = Options(text=text, steps=12, out=tmp_path / "out.png", save=tmp_path / f"states{suffix}")
    console = Console(record=True, width=100, quiet=False)
    report = run.demo(options, tiny, console)
    printed = console.export_text()

    assert report.dense.final_loss < report.dense.losses[0]
    assert report.largest_difference < 1e-4
    assert report.mode == "exact"
    assert report.fused_cost.peak_bytes > report.gradient_bytes
    assert [row.name for row in report.accuracy][:2] == ["dense", "filtered"]
    for expected in ("largest difference", "peak memory", "time of the loss", "live tiles", "error of dE", "total"):
        assert expected in printed
    with Image.open(options.out) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    saved = np.load(options.save) if suffix == ".npz" else torch.load(options.save)
    e, c, targets = (torch.as_tensor(saved[name]) for name in ("e", "c", "targets"))
    assert (e.shape, c.shape, targets.shape) == ((64, 16), (400, 16), (64,))
    assert len(saved["unigram_counts"]) == 400
    assert dense_loss(e, c, targets) < report.dense.losses[0]


def test_options_reach_the_demo(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []
    monkeypatch.setattr(run, "demo", seen.append)
    out, save = tmp_path / "a.PNG", tmp_path / "b.npz"
    argv = ["demo", "--text", str(text), "--steps", "7", "--backend", "torch", "--filtered", "--seed", "3"]
    assert main([*argv, "--out", str(out), "--save", str(save)]) == 0
    filtered = cce.Spec(filter="element")
    assert seen == [Options(text=text, steps=7, backend="torch", spec=filtered, seed=3, out=out, save=save)]


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "usable_device", interrupted)
    assert main(["demo"]) == 130


def test_writable_file_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "old.png"
    path.write_text("kept")
    command.writable_file("--out", str(path), (".png",))
    command.writable_file("--out", str(tmp_path / "new.png"), (".png",))
    assert [(p.name, p.read_text()) for p in tmp_path.glob("*.png")] == [("old.png", "kept")]


def test_folder_text(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("one", "sub/two", ".git/three", ".four"):
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    corpus = read_corpus(tmp_path, 10**6)
    assert sorted(corpus.pieces) == ["one\n", "sub/two\n"]
    assert (corpus.files, corpus.skipped, corpus.characters) == (2, 1, 12)


def test_text_is_cut_within_a_character(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("äöü", encoding="utf-8")
    assert read_corpus(path, 5).pieces == ["äö"]


def test_long_text_comes_in_pieces_of_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("a line of text\n" * 20_000)
    pieces = read_corpus(path, 10**6).pieces
    assert len(pieces) > 1
    assert all(piece.endswith("\n") for piece in pieces)
    assert "".join(pieces) == path.read_text()


def test_default_text_is_the_standard_library() -> None:
    corpus = read_corpus(None, 200_000)
    assert "Python" in corpus.source
    assert corpus.characters > 150_000
    assert any("def " in piece for piece in corpus.pieces)


def test_tokens_are_cached(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = read_corpus(text, 10**6)
    first = tokens.load_tokens(corpus, 400)
    assert first.dtype == torch.int64 and 256 < first.max() < 400
    (folder,) = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["ids.npy", "tokenizer.json"]
    tokenizer = tokens.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(first.tolist()) == text.read_text()

    trained = tokens.train_tokenizer
    monkeypatch.setattr(tokens, "train_tokenizer", None)
    assert torch.equal(tokens.load_tokens(corpus, 400), first)
    monkeypatch.setattr(tokens, "train_tokenizer", trained)
    assert tokens.load_tokens(corpus, 300).max() < 300


def npy(x: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


HUGE = b"{'descr': '<i8', 'fortran_order': False, 'shape': (100000000000000,), }".ljust(117) + b"\n"
DAMAGE = {
    "empty": b"",
    "cut": b"\x93NUMPY cut short",
    "strings": npy(np.array(["a"])),
    "structured": npy(np.zeros(2, [("a", int)])),
    "float": npy(np.array([1.5, 2.5])),
    "complex": npy(np.array([1j])),
    "bool": npy(np.array([True])),
    "unsealed": npy(np.zeros(9, np.int32)),
    "header of 1e14 entries": b"\x93NUMPY\x01\x00v\x00" + HUGE,
}


@pytest.mark.usefixtures("nothing_warned_of")
@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_damaged_tokens_are_made_anew(text: Path, cache: Path, content: bytes) -> None:
    corpus = read_corpus(text, 10**4)
    right = tokens.load_tokens(corpus, 300)
    (folder,) = cache.iterdir()
    (folder / "ids.npy").write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"file of the demo's tokens .*ids\.npy is not used"):
        assert torch.equal(tokens.load_tokens(corpus, 300), right)
    assert torch.equal(tokens.load_tokens(corpus, 300), right)
    assert np.array_equal(np.load(folder / "ids.npy"), right)


@pytest.mark.usefixtures("nothing_warned_of")
def test_cache_that_cannot_be_written(text: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="Not a directory") as warned:
        assert len(tokens.load_tokens(read_corpus(text, 10**6), 400)) > 1000
    assert len(warned) == 1


def test_model_is_causal(tiny: Size) -> None:
    torch.manual_seed(0)
    model = LanguageModel(tiny)
    inputs = torch.randint(tiny.vocab, (2, tiny.context))
    changed = inputs.clone()
    changed[:, 5:] = 0
    assert torch.allclose(model(inputs)[:, :5], model(changed)[:, :5], atol=1e-6)
    assert not torch.allclose(model(inputs)[:, 5:], model(changed)[:, 5:], atol=1e-3)


def test_runs_differ_only_in_the_loss(tiny: Size) -> None:
    text = torch.randint(tiny.vocab, (500,), generator=torch.Generator().manual_seed(0))
    options = Options(steps=5)
    runs = [Training(loss, text, options, tiny) for loss in (dense_loss, dense_loss, cce_loss("torch", cce.Spec()))]
    for _ in range(options.steps):
        for training in runs:
            training.step()
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses == pytest.approx(runs[2].losses, abs=1e-5)
    assert Training(dense_loss, text, dataclasses.replace(options, seed=1), tiny).losses == []
    assert runs[0].final_loss == runs[0].losses[-1]


def test_peak_memory_on_the_cpu_is_that_of_live_allocations() -> None:
    def step() -> torch.Tensor:
        first = torch.empty(10 * 2**20, dtype=torch.uint8)
        second = torch.empty(20 * 2**20, dtype=torch.uint8)
        del first
        third = torch.empty(5 * 2**20, dtype=torch.uint8)
        del second
        return third

    assert measure.peak_bytes(step, torch.device("cpu")) == 30 * 2**20


def test_cost_of_the_dense_loss_holds_the_logits() -> None:
    e, c, targets = torch.randn(64, 8), torch.randn(4096, 8), torch.zeros(64, dtype=torch.int64)
    logits = 64 * 4096 * 4
    cost = measure.measure({"dense": dense_loss}, e, c, targets, repeats=1)["dense"]
    assert 2 * logits <= cost.peak_bytes <= 4 * logits
    assert cost.seconds > 0


def test_dense_bfloat16_is_the_computation_in_that_dtype() -> None:
    torch.manual_seed(0)
    e, c, targets = torch.randn(32, 16).bfloat16(), torch.randn(128, 16).bfloat16(), torch.arange(32)

    def loss(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(e, c).float(), targets)

    real = evaluate.gradients(loss, e, c, targets)
    written_out = evaluate.dense_bfloat16(e, c, targets)
    for a, b in zip(written_out, real, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b.float()).norm() < 1e-3 * b.float().norm()


def test_evaluation_sees_what_the_filter_leaves_out() -> None:
    torch.manual_seed(0)
    # Rows that share a direction, along which they grow rarer, as those of a trained head do.
    shared = F.normalize(torch.ones(32), dim=0)
    c = torch.randn(32768, 32) / 4 + torch.linspace(4, -1, 32768)[torch.randperm(32768), None] * shared
    e = torch.randn(64, 32) / 2 + 2 * shared
    targets = (e @ c.T).softmax(1).multinomial(1)[:, 0]
    dense, filtered, compensated, unordered = evaluate.evaluate(e, c, targets, "torch")
    assert dense.live_fraction == 1.0 and 0 < compensated.live_fraction < unordered.live_fraction
    assert dense.de < 0.01
    assert compensated.de < filtered.de / 4
    assert filtered.live_fraction == compensated.live_fraction
