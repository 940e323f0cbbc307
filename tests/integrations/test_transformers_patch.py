"""``patch`` and ``unpatch``: what they accept, and what a patched model may be asked."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers")

import transformers
from tiny_models import BASE, LENGTH, V, assert_same_step, error, make_batch, make_model, step

import cce
from cce.integrations.transformers import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")
Llama = transformers.LlamaForCausalLM


def mean_nll(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


INPUTS: dict[str, dict[str, Any]] = {
    "num-items": {"num_items_in_batch": 17},
    "num-items-tensor": {"num_items_in_batch": torch.tensor(17)},
    "shift-labels": {"shift_labels": make_batch()["input_ids"].roll(2, 1)},
    "shift-labels-and-num-items": {"shift_labels": make_batch()["labels"].roll(-1, 1), "num_items_in_batch": 9},
    "ignore-index": {"labels": make_batch()["labels"].clamp(min=1), "ignore_index": 1},
    "logits-to-keep": {"logits_to_keep": 5, "labels": make_batch()["labels"][:, -5:]},
    "positions-to-keep": {"logits_to_keep": torch.tensor([2, 3, 7]), "labels": make_batch()["labels"][:, [2, 3, 7]]},
    "attention-mask": {"attention_mask": (torch.arange(LENGTH) > 3).long().expand(3, -1)},
    "hidden-states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_inputs(family: str, name: str) -> None:
    model, inputs = make_model(family), INPUTS[name]
    expected = step(model, **inputs)
    found = step(patch(model), **inputs)
    assert found.output.logits is None and "logits" not in found.output
    assert found.output.keys() == expected.output.keys() - {"logits"}
    assert_same_step(found, expected)


def test_labels_may_be_positional() -> None:
    model = patch(make_model())
    position = list(inspect.signature(model.forward).parameters).index("labels")
    batch = make_batch()
    assert model(batch["input_ids"], *[None] * (position - 1), batch["labels"]).logits is None


def test_a_tuple_keeps_its_places() -> None:
    model, batch = patch(make_model()), make_batch()
    loss, logits = model(**batch, return_dict=False)[:2]
    assert logits is None and loss == model(**batch).loss


def test_labels_that_are_all_ignored() -> None:
    """The mean of none is NaN; the sum over the batches' number of items is 0."""
    model, labels = patch(make_model()), torch.full((3, LENGTH), -100)
    assert step(model, labels=labels).loss.isnan()
    assert step(model, labels=labels, num_items_in_batch=5).loss == 0


def test_activation_checkpointing() -> None:
    model = make_model()
    expected = step(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_same_step(step(patch(model)), expected)


def test_the_load_balancing_loss_is_kept() -> None:
    model = patch(make_model("mixtral"))
    model.router_aux_loss_coef = 0.1
    with_it = step(model)
    model.router_aux_loss_coef = 0.0
    assert with_it.loss - step(model).loss == pytest.approx(0.1 * float(with_it.output.aux_loss.detach()), rel=1e-4)


def test_options() -> None:
    """z-loss, class weights and label smoothing, against their definitions."""
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        logits = model(**batch).logits
    weight = torch.rand(V, generator=torch.Generator().manual_seed(5))
    targets = batch["labels"][:, 1:]
    expected = mean_nll(logits, batch["labels"], label_smoothing=0.2, weight=weight)
    lse = logits[:, :-1].logsumexp(-1)[targets >= 0]
    expected = expected + 0.1 * lse.square().sum() / weight[targets[targets >= 0]].sum()
    patch(model, label_smoothing=0.2, weight=weight, z_loss=0.1, backend="reference", spec=cce.Spec(filter="none"))
    assert error(step(model).loss, expected) < 1e-6
    with torch.no_grad():  # evaluation is the model's own
        assert error(model(**batch).loss, mean_nll(logits, batch["labels"])) < 1e-6


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"chunk": 3}, TypeError, r"chunk: got 3, expected an option out of \('backend', "),
    "reduction": ({"reduction": "sum"}, TypeError, "reduction: got 'sum', expected an option"),
    "backend": ({"backend": "no"}, ValueError, "backend: got 'no'"),
    "spec": ({"spec": 3}, TypeError, "spec: got 3"),
    "label_smoothing": ({"label_smoothing": 2}, ValueError, "label_smoothing: got 2"),
    "z_loss": ({"z_loss": -1}, ValueError, "z_loss: got -1"),
    "weight": ({"weight": torch.ones(V - 1)}, ValueError, r"weight: got shape \(202,\), expected \(203,\)"),
    "weight-list": ({"weight": [1.0] * V}, TypeError, "weight: got"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str) -> None:
    options, kind, message = BAD_OPTIONS[name]
    model = make_model()
    with pytest.raises(kind, match=message):
        patch(model, **options)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("model", [None, "llama", nn.Linear(2, 3), nn.Linear, dict, transformers.LlamaConfig()])
@pytest.mark.parametrize("call", [patch, unpatch])
def test_not_a_model(call: Any, model: Any) -> None:
    with pytest.raises(TypeError, match=r"model: got (an instance of|the class) \w+, expected a transformers.Pre"):
        call(model)


def test_models_without_a_head() -> None:
    config = transformers.LlamaConfig(**BASE)
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        patch(transformers.LlamaModel(config))
    with pytest.raises(ValueError, match=r"LlamaModel.forward has no argument labels"):
        patch(transformers.LlamaModel)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no output head"):
        patch(transformers.LlamaForSequenceClassification(config))


class OwnLoss(Llama):
    """A model whose loss needs the elements of its logits."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        output = super().forward(input_ids)
        output.loss = -output.logits.log_softmax(-1)[..., 0].mean()
        return output


class NoLoss(Llama):
    """A model that does nothing with its labels."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(input_ids)


class Nested(Llama):
    """A model whose forward calls that of its class."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(input_ids, labels=labels)


def test_models_that_cannot_be_followed() -> None:
    config, batch = transformers.LlamaConfig(**BASE), make_batch()
    with pytest.raises(ValueError, match=r"OwnLoss calls log_softmax\(logits \(3, 12, 203\), -1\) on its logits"):
        patch(OwnLoss(config)).train()(**batch)
    with pytest.raises(ValueError, match="NoLoss got labels but computed no loss"):
        patch(NoLoss(config)).train()(**batch)


def test_a_patched_class_and_its_patched_parent() -> None:
    model = Nested(transformers.LlamaConfig(**BASE)).train()
    expected = step(model)
    patch(Llama)
    patch(Nested)
    try:
        found = step(model)
    finally:
        unpatch(Nested)
        unpatch(Llama)
    assert found.output.logits is None
    assert_same_step(found, expected)


def test_an_instance_is_restored() -> None:
    model = make_model()
    before, forward = dict(vars(model)), model.forward
    head = dict(vars(model.lm_head))
    assert patch(model) is model
    step(model)
    assert unpatch(model) is model
    assert vars(model) == before and vars(model.lm_head) == head and model.forward == forward


def test_an_instance_with_a_forward_of_its_own_is_restored() -> None:
    """As accelerate's hooks leave it."""
    model = make_model()
    expected, forward = step(model), model.forward
    model.forward = own = lambda *args, **kwargs: forward(*args, **kwargs)
    own.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    found = step(patch(model))
    assert found.output.logits is None
    assert_same_step(found, expected)
    assert unpatch(model).forward is own


def test_a_failed_step_leaves_the_head_as_it_was() -> None:
    model = patch(make_model())
    with pytest.raises(ValueError, match=r"targets|labels"):
        step(model, labels=torch.full((3, LENGTH), V + 3))
    assert "forward" not in vars(model.lm_head)
    assert step(model).output.logits is None


def test_the_signature_is_kept() -> None:
    """Trainer reads it to see which columns and which arguments of the loss the model takes."""
    model = make_model()
    before, of_class = inspect.signature(model.forward), inspect.signature(Llama.forward)
    assert inspect.signature(patch(model).forward) == before
    assert model.forward.__doc__ == Llama.forward.__doc__ and model.forward.__name__ == "forward"
    patch(Llama)
    try:
        assert list(inspect.signature(Llama.forward).parameters) == list(of_class.parameters)
    finally:
        unpatch(Llama)


def test_twice() -> None:
    model = patch(make_model(), z_loss=0.5)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is patched already, with options {'z_loss': 0.5}"):
        patch(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        unpatch(Llama)
    unpatch(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        unpatch(model)


def test_class_and_instance() -> None:
    model = make_model()
    patch(Llama)
    try:
        with pytest.raises(ValueError, match="patched already as a class"):
            patch(model)
        with pytest.raises(ValueError, match=r"is patched as a class, expected unpatch\(LlamaForCausalLM\)"):
            unpatch(model)
    finally:
        unpatch(Llama)


def test_a_copy_is_patched_on_its_own() -> None:
    model = patch(make_model())
    other = copy.deepcopy(model)
    expected = step(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same_step(step(other), expected)
    unpatch(model)
    assert step(other).output.logits is None and step(model).output.logits is not None


def test_a_state_dict_knows_nothing_of_it(tmp_path: Path) -> None:
    model = patch(make_model())
    model.save_pretrained(tmp_path)
    loaded = Llama.from_pretrained(tmp_path).train()
    found = step(loaded)
    assert found.output.logits is not None
    assert_same_step(found, step(model))


def test_training_without_labels_warns_once() -> None:
    """As Trainer's label smoothing does: the logits are there, and so is their memory."""
    model, tokens = patch(make_model()), make_batch()["input_ids"]
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM is patched .* use patch\(model, label_smoothing"):
        assert model(tokens).logits.shape == (3, LENGTH, V)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(tokens).logits is not None


def test_old_and_missing_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"transformers: got version 4.57.6, expected 5 or later"):
        patch(model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: python -m pip install 'cce-kernels\[transformers\]'"):
        patch(model)
