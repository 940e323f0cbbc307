"""Copies of a patched model, by pickle and otherwise, and its end."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from tiny_models import V, assert_same_step, make_model, step

import cce
from cce.integrations.transformers import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")
Llama = transformers.LlamaForCausalLM
OPTIONS: dict[str, Any] = {
    "label_smoothing": 0.5,
    "z_loss": 0.1,
    "weight": torch.linspace(0.5, 2, V),
    "backend": "reference",
    "spec": cce.Spec(filter="none"),
}


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    **{f"pickle-{p}": lambda model, p=p: pickle.loads(pickle.dumps(model, p)) for p in (0, 2, pickle.HIGHEST_PROTOCOL)},
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
    "a copy's copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(model))))),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_patched_with_its_options(name: str) -> None:
    model = make_model()
    plain = step(model)
    patch(model, **OPTIONS)
    expected = step(model)
    found = COPIES[name](model)
    result = step(found)
    assert result.output.logits is None
    assert_same_step(result, expected)
    # On its own: it goes on without the first, and unpatch leaves nothing of the patch.
    unpatch(model)
    del model
    assert step(found).output.logits is None
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is patched already, with options {'label_smoothing': 0.5"):
        patch(found)
    unpatch(found)
    assert vars(found).keys() == vars(make_model()).keys() and not found.base_model._forward_pre_hooks
    assert_same_step(step(found), plain)


def test_another_process(tmp_path: Path) -> None:
    """As spawn, joblib and Ray send a model; of an instance, and of a class that the process has not patched."""
    models = {"instance": patch(make_model(), label_smoothing=0.5)}
    expected = step(models["instance"]).loss
    patch(Llama, label_smoothing=0.5)
    try:
        (tmp_path / "class").write_bytes(pickle.dumps(make_model()))
    finally:
        unpatch(Llama)
    (tmp_path / "instance").write_bytes(pickle.dumps(models["instance"]))
    script = (
        "import pickle, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny_models import step\n"
        "for path in sys.argv[2:]:\n"
        "    found = step(pickle.load(open(path, 'rb')))\n"
        "    print(found.output.logits, found.loss.item())\n"
    )
    arguments = [str(Path(__file__).parent), str(tmp_path / "instance"), str(tmp_path / "class")]
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    lines = [line.split() for line in ran.stdout.splitlines() if line.startswith("None ")]
    assert [float(loss) for _, loss in lines] == pytest.approx([float(expected)] * 2, rel=1e-6)


def test_copies_of_a_patched_class() -> None:
    """Where it is patched they are as all its instances; where it is no longer, they are patched themselves."""
    patch(Llama, label_smoothing=0.5)
    try:
        model = make_model()
        expected, data = step(model), pickle.dumps(model)
        for found in (pickle.loads(data), copy.deepcopy(model), copy.copy(model)):
            assert "forward" not in vars(found)
            assert_same_step(step(found), expected)
    finally:
        unpatch(Llama)
    assert vars(Llama).keys().isdisjoint({"__reduce_ex__", "__setattr__", "_cce_patch"})
    found = pickle.loads(data)
    assert_same_step(step(found), expected)
    assert step(unpatch(found)).output.logits is not None
    assert step(copy.deepcopy(make_model())).output.logits is not None


def test_a_copy_that_cannot_be_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(patch(make_model()))
    with monkeypatch.context() as other:
        other.setattr(sys.modules["transformers"], "__version__", "4.57.6")
        with pytest.raises(ImportError, match=r"transformers: got version 4.57.6, expected 5 or later"):
            pickle.loads(data)
    with monkeypatch.context() as other:
        other.setattr(Llama, "forward", lambda self, input_ids: None)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM.forward has no argument labels"):
            pickle.loads(data)


def test_a_model_that_accelerate_has_unwrapped() -> None:
    """Its unwrap_model leaves a method made of the patched function, for pickling."""
    model = patch(make_model(), label_smoothing=0.5)
    expected = step(model)
    model.forward = MethodType(model.forward.__func__, model)
    assert_same_step(step(pickle.loads(pickle.dumps(model))), expected)


def test_the_backbone_alone() -> None:
    """A copy of it has no head, and no patched model."""
    model = patch(make_model())
    patched = len(pickle.dumps(model.model))
    assert copy.deepcopy(model.model)(torch.zeros(1, 3, dtype=torch.long)).last_hidden_state.shape == (1, 3, 32)
    assert patched < len(pickle.dumps(unpatch(model).model)) + 1000 < len(pickle.dumps(model))


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only references count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("after", [*COPIES, "step", "unpatch", "patch of a class"])
def test_a_deleted_model_is_freed_at_once(after: str) -> None:
    model = make_model()
    reference = weakref.ref(model)
    if after == "patch of a class":
        patch(Llama)
        unpatch(Llama)
    else:
        patch(model)
    if after in COPIES:
        model = COPIES[after](model)
        assert reference() is None
        reference = weakref.ref(model)
    if after == "step":
        step(model)
    if after == "unpatch":
        unpatch(model)
    weight = weakref.ref(model.lm_head.weight)
    del model
    assert reference() is None and weight() is None


@pytest.mark.usefixtures("no_collector")
def test_a_forward_whose_model_is_gone() -> None:
    forward = patch(make_model()).forward
    with pytest.raises(ReferenceError, match="the patched model of this forward no longer exists"):
        forward(torch.zeros(1, 3, dtype=torch.long))
