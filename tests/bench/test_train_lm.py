"""A whole run on a few small files: what is held out, what is written, what is kept for the next run."""

from __future__ import annotations

import bpe
import corpus
import numpy as np
import pytest
import torch
import train_lm

from cce.benchmarks import extend

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = "--vocab 400 --width 16 --layers 1 --context 16 --batch 4 --steps 4 --keep 40 --tokens 3000 --device cpu"


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """800 packages of one file each."""
    folder = tmp_path_factory.mktemp("roots")
    for n in range(800):
        package = folder / f"package{n}"
        package.mkdir()
        lines = (f"def function_{n}_{m}(x):\n    return x * {m * n % 97} + {m}\n" for m in range(4))
        (package / "code.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(roots, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "trained.pt"
    train_lm.main(["--roots", str(roots), "--out", str(out), *SIZES.split()])
    return out


def test_record(trained):
    found = torch.load(trained, weights_only=True)
    assert found["e"].shape == (48, 16) and found["e"].dtype == torch.bfloat16
    assert found["c"].shape == (400, 16) and found["c"].dtype == torch.bfloat16
    assert found["targets"].shape == (48,)
    assert found["unigram_counts"].shape == (400,) and found["unigram_counts"].sum() == 3000
    assert 0 < found["facts"]["held_out_loss"] < 7


def test_record_is_a_head_to_extend(trained):
    head = extend.extend(extend.load(trained), 64, 24, 500)
    assert head.e.shape == (64, 24) and head.c.shape == (500, 24)


def test_second_run_takes_the_tokens(trained, roots, capsys):
    train_lm.main(["--roots", str(roots), "--out", str(trained), "--prepare-only", *SIZES.split()])
    assert "earlier run" in capsys.readouterr().out


def test_text_too_short_is_said(roots, tmp_path, capsys):
    sizes = SIZES.replace("3000", "9000000").split()
    train_lm.main(["--roots", str(roots), "--out", str(tmp_path / "x.pt"), "--prepare-only", *sizes])
    assert "fewer than the 9,000,000 asked for" in capsys.readouterr().out


def test_epoch_shows_all_windows_once():
    windows = torch.cat(list(train_lm.batches(torch.arange(101), 10, 4, 3, seed=0)))
    assert sorted(windows[:10, 0].tolist()) == list(range(0, 100, 10))
    assert len(windows) == 12 and torch.equal(windows[:, 1:], windows[:, :-1] + 1)


def test_held_out_packages_are_whole(roots):
    found = corpus.read_corpus([roots])
    names = str(found.facts["held_out_packages"]).split(", ")
    assert found.held_out and len(names) == len(found.held_out)
    assert len(found.training) + len(found.held_out) == 800


def test_only_written_text_is_read_and_only_once(tmp_path):
    texts = {"a.py": "x = 1\n", "copy.py": "x = 1\n", "b.md": "text\n", "long.js": "y" * 5000, "c.bin": "z", "d.py": ""}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.c").write_bytes(b"a\0b")
    (tmp_path / "latin.h").write_bytes(b"\xe9\n")
    documents, facts = corpus.read_documents([tmp_path])
    assert [x.text for x in documents] == ["x = 1\n", "text\n"]
    assert facts == {"files": 7, "documents": 2, "duplicates": 1, "skipped": 4}


def test_documents_end_with_their_own_token():
    tokenizer = bpe.train_tokenizer(["a b a b"] * 3, 300)
    ids = bpe.encode(tokenizer, ["a b", "a"], 100)
    assert ids[-1] == 0 and (ids == 0).sum() == 2 and ids.dtype == np.uint16
