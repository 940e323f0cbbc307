"""A whole run on a few small files: what is held out, what is written, what is kept for the next run."""

from __future__ import annotations

import bpe
import corpus
import lm
import lm_training
import numpy as np
import pytest
import torch
import train_lm

from cce.benchmarks import extend

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = "--vocab 400 --context 16 --batch 4 --steps 4 --keep 40 --tokens 3000 --device cpu --tune-batch 4"
MODELS = "--models 16x1 12x2 --tune documentation --tune-steps 3"


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """800 packages of one file of code each, every fourth with a page of documentation."""
    folder = tmp_path_factory.mktemp("roots")
    for n in range(800):
        package = folder / f"package{n}"
        package.mkdir()
        lines = (f"def function_{n}_{m}(x):\n    return x * {m * n % 97} + {m}\n" for m in range(4))
        (package / "code.py").write_text("".join(lines))
        if n % 4 == 0:
            (package / "page.md").write_text(f"# Package {n}\n\nIt multiplies, by {n} at most, and adds.\n" * 3)
    return folder


@pytest.fixture(scope="module")
def trained(roots, tmp_path_factory):
    """The folder of two models, the first of them fine-tuned, too."""
    out = tmp_path_factory.mktemp("trained")
    train_lm.main(["--roots", str(roots), "--out", str(out), *SIZES.split(), *MODELS.split()])
    return out


def load(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize(("name", "width"), [("16x1", 16), ("12x2", 12), ("16x1-tuned", 16)])
def test_files(trained, name, width):
    found = load(trained, name)
    assert found["e"].shape == (48, width) and found["e"].dtype == torch.bfloat16
    assert found["c"].shape == (400, width) and found["c"].dtype == torch.bfloat16
    assert found["targets"].shape == (48,) and found["unigram_counts"].shape == (400,)
    facts = found["facts"]
    assert facts["name"] == name and facts["width"] == width and 0 < facts["held_out_loss"] < 7
    assert facts["domain"] == "documentation" and facts["torch"] == str(torch.__version__)


def test_fine_tuning_goes_on_from_the_first_model_with_other_text(trained):
    base, tuned = load(trained, "16x1"), load(trained, "16x1-tuned")
    assert tuned["facts"]["tuned_from"] == "16x1" and tuned["facts"]["steps"] == 3
    assert tuned["facts"]["rate"] == pytest.approx(0.1 * base["facts"]["rate"])
    change = (tuned["c"].float() - base["c"].float()).norm() / base["c"].float().norm()
    assert 0 < change < 0.2
    assert tuned["facts"]["held_out_loss"] < tuned["facts"]["held_out_loss_before"]
    assert base["unigram_counts"].sum() == 3000 and tuned["unigram_counts"].sum() == 3 * 4 * 16
    assert not torch.equal(base["targets"], tuned["targets"])


def test_record_is_a_head_to_extend(trained):
    head = extend.extend(extend.load(trained / "16x1.pt"), 64, 24, 500)
    assert head.e.shape == (64, 24) and head.c.shape == (500, 24)


def test_second_run_takes_the_tokens(trained, roots, capsys):
    train_lm.main(["--roots", str(roots), "--out", str(trained), "--prepare-only", *SIZES.split(), *MODELS.split()])
    assert "earlier run" in capsys.readouterr().out


def test_text_too_short_is_said(roots, tmp_path, capsys):
    sizes = SIZES.replace("3000", "9000000").split()
    train_lm.main(["--roots", str(roots), "--out", str(tmp_path), "--prepare-only", "--tune", "none", *sizes])
    assert "fewer than the 9,000,000 asked for" in capsys.readouterr().out


def test_epoch_shows_all_windows_once():
    windows = torch.cat(list(lm_training.batches(torch.arange(101), 10, 4, 3, seed=0)))
    assert sorted(windows[:10, 0].tolist()) == list(range(0, 100, 10))
    assert len(windows) == 12 and torch.equal(windows[:, 1:], windows[:, :-1] + 1)


def test_held_out_packages_are_whole(roots):
    found = corpus.read_corpus([roots])
    names = str(found.facts["held_out_packages"]).split(", ")
    general = found.general
    assert general.held_out and len(names) <= len(general.held_out) and found.domain is None
    assert len(general.training) + len(general.held_out) == 1000


def test_a_domain_is_kept_from_the_other_text(roots):
    found = corpus.read_corpus([roots], domain="documentation")
    code, pages = found.general, found.domain
    assert len(code.training) + len(code.held_out) == 800 and len(pages.training) + len(pages.held_out) == 200
    assert all(text.startswith("def ") for text in (*code.training, *code.held_out))
    assert pages.held_out and all(text.startswith("# Package") for text in (*pages.training, *pages.held_out))
    with pytest.raises(ValueError, match="got 0 c documents, expected at least two"):
        corpus.read_corpus([roots], domain="c")


def test_tokenizer_has_seen_the_domain(roots):
    found = corpus.read_corpus([roots], domain="documentation")
    texts = list(bpe.sample(found, 10_000))
    pages = sum(text.startswith("# Package") for text in texts)
    assert 0 < pages < len(texts) and sum(map(len, texts)) < 12_000


def plan(**changed):
    usual = {"steps": 40, "seconds": None, "batch": 2, "rate": 1e-3, "backend": "torch", "seed": 0}
    return lm_training.Plan(**usual | changed)


def test_a_training_ends_by_time_and_its_rate_falls_till_then(monkeypatch):
    """On a clock by which the first step takes 100 s and the others 10."""
    now, rates = [0.0], []
    monkeypatch.setattr(lm_training.time, "perf_counter", lambda: now[0])

    def loss(e, c, targets, backend):
        now[0] += 100 if not rates else 10
        rates.append(optimizers[0].param_groups[0]["lr"])
        return e.float().mean()

    optimizers = []
    made = lm_training.make_optimizer
    monkeypatch.setattr(lm_training, "make_optimizer", lambda *x: optimizers.append(made(*x)) or optimizers[0])
    monkeypatch.setattr(lm_training, "mean_loss", loss)
    model = lm.LanguageModel(lm.Sizes(vocab=50, width=8, layers=1, context=4))
    facts = lm_training.train(model, np.arange(50), 4, plan(seconds=300.0))
    assert facts["steps"] == len(rates) == 22 and facts["steps_planned"] == 40 and facts["training_s"] == 310
    assert rates[1] == pytest.approx(1e-3), "the first step took none of the warm-up, the second begins after it"
    assert rates[-1] == pytest.approx(1e-4) and sorted(rates[1:], reverse=True) == rates[1:]


def test_without_a_limit_all_steps_are_taken():
    model = lm.LanguageModel(lm.Sizes(vocab=50, width=8, layers=1, context=4))
    facts = lm_training.train(model, np.arange(50), 4, plan(steps=5))
    assert facts["steps"] == 5 and facts["limit_s"] is None and facts["epochs"] == pytest.approx(40 / 50)


def test_too_few_held_out_tokens_are_said_before_the_training(trained, roots, capsys):
    options = ["--roots", str(roots), "--out", str(trained), *SIZES.split(), *MODELS.split()]
    with pytest.raises(ValueError, match=r"held-out tokens, expected at least 20,001"):
        train_lm.main([*options, "--keep", "20000"])
    assert "million parameters" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--models", "huge"], "got 'huge', expected WIDTHxLAYERS or one of small, base, large"),
        (["--models", "base", "base"], "--models: expected different names"),
        (["--models", "base", "small", "--seconds", "1", "2", "3"], "--seconds as many numbers as models"),
        (["--seconds", "0"], "got '0', expected seconds, more than 0"),
    ],
)
def test_bad_options(argv, said, capsys):
    with pytest.raises(SystemExit):
        train_lm.parse(["--out", "x", *argv])
    assert said in capsys.readouterr().err


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
