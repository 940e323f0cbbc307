"""Each family of transformers' models trains, evaluates and generates as before, with less memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import FAMILIES, V, assert_same_step, error, make_batch, make_class, make_model, step
from transformers import Trainer, TrainingArguments

import cce
from cce.demo.measure import peak_bytes
from cce.integrations.transformers import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_loss_and_gradients(family: str) -> None:
    model = make_model(family)
    expected = step(model)
    assert expected.output.logits is not None
    found = step(patch(model))
    assert found.output.logits is None
    assert_same_step(found, expected)


@every_family
def test_every_gradient_is_there(family: str) -> None:
    """So that the comparison above has something to compare."""
    gradients = step(patch(make_model(family))).gradients
    assert len(gradients) > 8
    assert all(g.norm() > 1e-6 for name, g in gradients.items() if not name.endswith("k_proj.bias"))


@every_family
def test_bf16(family: str) -> None:
    """At most twice the error of the model's own bf16 loss, against the same weights in float32."""
    model = make_model(family).bfloat16()
    dense = step(model)
    found = step(patch(model))
    exact = step(unpatch(model).float())
    flat = [torch.cat([g.float().flatten() for g in x.gradients.values()]) for x in (found, dense, exact)]
    assert error(flat[0], flat[2]) <= 2 * error(flat[1], flat[2])
    head = [next(g for g in reversed(list(x.gradients.values())) if g.shape[:1] == (V,)) for x in (found, dense, exact)]
    assert error(head[0], head[2]) <= 2 * error(head[1], head[2])
    assert abs(found.loss - exact.loss) <= 2 * abs(dense.loss - exact.loss) + 2**-8 * exact.loss


@every_family
def test_evaluation_and_generation(family: str) -> None:
    """Bit for bit, in evaluation and, as some generate while they train, in training without gradients."""
    # Until some release after 5.12, generate fails with router logits.
    model = make_model(family, **({"output_router_logits": False} if family == "mixtral" else {}))
    batch = make_batch()
    tokens = batch["input_ids"][:, :5]

    def results() -> list[Any]:
        with torch.no_grad():
            outputs = [model.train(mode)(**batch) for mode in (True, False)]
        generated = [model.train(mode).generate(tokens, max_new_tokens=4, do_sample=False) for mode in (True, False)]
        with_gradients = model.eval()(**batch)
        return [x for o in (*outputs, with_gradients) for x in (o.loss, o.logits)] + generated

    expected = results()
    patch(model)
    found = results()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert found[1].shape[-1] == V


@every_family
def test_a_class(family: str) -> None:
    """An instance made before and one made after; unpatch leaves the very function that was there."""
    cls, before = make_class(family), make_model(family)
    had, expected = dict(vars(cls)), step(before)
    patch(cls)
    try:
        assert cls.forward is not had["forward"]
        for model in (before, make_model(family)):
            found = step(model)
            assert found.output.logits is None
            assert_same_step(found, expected)
    finally:
        unpatch(cls)
    assert cls.forward is had["forward"]
    assert dict(vars(cls)) == had
    assert step(before).output.logits is not None


@every_family
def test_memory(family: str) -> None:
    """Less by more than the logits, which a training step without cce holds more than once."""
    vocabulary, rows = 4000, 12
    model = make_model(family, vocab_size=vocabulary)
    batch = make_batch(rows)
    device = torch.device("cpu")

    def train() -> None:
        model(**batch).loss.backward()

    train()  # the gradients exist afterwards
    dense = peak_bytes(train, device)
    patch(model, spec=cce.Spec(scratch_bytes=2**18))
    found = peak_bytes(train, device)
    assert dense is not None and found is not None
    logits = batch["input_ids"].numel() * vocabulary * 4
    assert found < dense - logits


@pytest.fixture
def quiet() -> Any:
    """Trainer reports every step."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def make_data(rows: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, V, (rows, 10), generator=generator)
    # A different number of labels in each row: the mean of means is not the mean.
    return [{"input_ids": x, "labels": torch.where(torch.arange(10) < i % 7, -100, x)} for i, x in enumerate(tokens)]


def train(model: Any, folder: Path, **options: Any) -> tuple[list[float], dict[str, float], Any]:
    """A few steps of Trainer: losses, evaluation, predictions."""
    data = make_data()
    arguments = TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    predicted = trainer.predict(data[:8], ignore_keys=["aux_loss", "router_logits", "cache", "past_key_values"])
    return losses, trainer.evaluate(), predicted.predictions


@every_family
@pytest.mark.usefixtures("quiet")
def test_trainer(family: str, tmp_path: Path) -> None:
    """The same curve, with gradient accumulation over batches with different numbers of labels."""
    expected, evaluation, logits = train(make_model(family), tmp_path)
    losses, found_evaluation, found_logits = train(patch(make_model(family)), tmp_path)
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(expected, rel=1e-5)
    assert found_evaluation["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-5)
    assert found_logits.shape == logits.shape == (8, 10, V)
