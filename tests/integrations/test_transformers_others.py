"""Other libraries that put their forward over a patched one, or cce's over theirs: Liger, TRL, whoever."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

import transformers
from tiny_models import BASE, V, make_batch, make_model, step

from cce.integrations.transformers import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")
Llama = transformers.LlamaForCausalLM

# What such libraries do, in a module of their name: the loss by the backbone and the head's weight, without the head;
# what TRL's trainers do around the model; and a cross_entropy that is no function of torch.
FOREIGN = """
def forward(self, input_ids=None, labels=None, **kwargs):
    e = self.model(input_ids=input_ids).last_hidden_state
    z = torch.matmul(e[:, :-1], self.lm_head.weight.T).flatten(0, 1)
    return CausalLMOutput(loss=torch.nn.functional.cross_entropy(z, labels[:, 1:].flatten()))

def compute_loss(model, **inputs):
    return model(**inputs)

def cross_entropy(input, target, *args, **kwargs):
    return cross_entropy_kernel(input, target)
"""


def library(name: str) -> dict[str, Any]:
    names: dict[str, Any] = {
        "__name__": name,
        "torch": torch,
        "CausalLMOutput": transformers.modeling_outputs.CausalLMOutput,
    }
    exec(FOREIGN, names)
    return names


LIGER, TRL, OTHER = library("liger_kernel.transformers.model.llama"), library("trl.trainer.utils"), library("other")


def over_instance(model: Any, forward: Callable[..., Any]) -> None:
    """As Liger, and TRL, whose wrapper has the name of what it does not call."""
    model.forward = MethodType(functools.wraps(type(model).forward)(forward), model)


@pytest.fixture
def patched_class() -> Iterator[type[Any]]:
    patch(Llama, label_smoothing=0.5)
    patched = Llama.forward
    yield Llama
    Llama.forward = patched
    unpatch(Llama)


@pytest.mark.parametrize(
    "foreign", [LIGER, TRL, library("cut_cross_entropy.transformers.llama")], ids=lambda x: x["__name__"]
)
def test_over_a_forward_that_has_a_loss_of_its_own(foreign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        f"the forward of LlamaForCausalLM is {re.escape(foreign['__name__'])}.forward, which computes the loss itself"
    )
    model = make_model()
    over_instance(model, foreign["forward"])
    before = dict(vars(model))
    with pytest.raises(ValueError, match=message):
        patch(model)
    assert vars(model) == before and not model.model._forward_pre_hooks
    monkeypatch.setattr(Llama, "forward", foreign["forward"])
    for target in (Llama, make_model()):
        with pytest.raises(ValueError, match=message):
            patch(target)


def test_liger_itself() -> None:
    apply = pytest.importorskip("liger_kernel.transformers.monkey_patch")._apply_liger_kernel_to_instance
    rest = {"rope": False, "rms_norm": False, "swiglu": False}  # these stay in the process, and want a GPU
    model = make_model()
    apply(model=model, **rest)
    with pytest.raises(ValueError, match=r"liger_kernel.* apply Liger with fused_linear_cross_entropy=False"):
        patch(model)
    model = make_model()
    apply(model=model, fused_linear_cross_entropy=False, **rest)
    assert step(patch(model)).output.logits is None


@pytest.mark.parametrize(
    ("foreign", "remedy"),
    [
        (LIGER, "apply Liger with fused_linear_cross_entropy=False"),
        (TRL, "give TRL a model that is not patched"),
        (OTHER, "patch the model after that"),
    ],
    ids=["liger", "trl", "other"],
)
def test_under_a_forward_that_has_a_loss_of_its_own(foreign: Any, remedy: str) -> None:
    """The first training step tells, once; evaluation has no part in the loss."""
    model = patch(make_model(), label_smoothing=0.5)
    over_instance(model, foreign["forward"])
    with torch.no_grad():
        model(**make_batch())
    model.eval()(**make_batch())
    message = (
        rf"LlamaForCausalLM is patched by cce, but {foreign['__name__']}.forward replaced its forward .* "
        rf"the options of patch \({{'label_smoothing': 0.5}}\) have no effect; .*{remedy}"
    )
    with pytest.warns(UserWarning, match=message):
        step(model.train())
    step(model)


def test_a_replaced_forward_can_be_taken_away() -> None:
    model = patch(make_model(), z_loss=0.5)
    over_instance(model, OTHER["forward"])
    with pytest.raises(ValueError, match=r"was replaced after patch, by other.forward, .* `del model.forward`"):
        unpatch(model)
    with pytest.raises(ValueError, match=r"is patched already, with options {'z_loss': 0.5}; unpatch it first"):
        patch(model)
    del model.forward
    unpatch(model)
    assert vars(model).keys() == vars(make_model()).keys() and not model.model._forward_pre_hooks
    assert step(patch(model)).output.logits is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_inside_peft() -> None:
    """It calls the forward of a model, not the model and its hooks."""
    peft = pytest.importorskip("peft")
    model = patch(make_model())
    over_instance(model, OTHER["forward"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match=r"patched by cce, but other.forward"):
        step(adapted)


def test_compiled() -> None:
    model = patch(make_model())
    over_instance(model, OTHER["forward"])
    with pytest.warns(UserWarning, match=r"patched by cce, but other.forward"):
        step(torch.compile(model, backend="eager"))
    torch.compiler.reset()


def test_a_wrapper_that_calls_the_patched_forward() -> None:
    """Whether it can be told from the wrapper or not."""
    for told in (True, False):
        model = patch(make_model())
        forward = model.forward
        wrapper = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)  # noqa: E731
        model.forward = functools.wraps(forward)(wrapper) if told else wrapper
        assert step(model).output.logits is None
        with pytest.raises(ValueError, match="was wrapped after patch" if told else "was replaced after patch"):
            unpatch(model)


def test_an_instance_of_a_patched_class(patched_class: type[Any]) -> None:
    """TRL's wrapper says that it wraps the class's forward, which is the patched one."""
    model = make_model()
    over_instance(model, TRL["forward"])
    with pytest.warns(
        UserWarning, match=r"patched by cce, but trl.trainer.utils.forward .* \({'label_smoothing': 0.5}\)"
    ):
        step(model)
    del model.forward
    assert step(model).output.logits is None


def test_a_patched_class(patched_class: type[Any]) -> None:
    model = make_model()
    patched_class.forward = OTHER["forward"]
    with pytest.raises(ValueError, match=r"was replaced after patch, by other.forward"):
        unpatch(patched_class)
    for found in (model.train(), make_model()):  # one that was there, a new one
        with pytest.warns(UserWarning, match=r"patched by cce, but other.forward"):
            step(found)


class Own(Llama):
    """A subclass with a forward of its own."""

    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
        return OTHER["forward"](self, input_ids, labels)


def test_a_subclass_of_a_patched_class(patched_class: type[Any]) -> None:
    """It is not patched, so nothing is put over cce's."""
    assert step(Own(transformers.LlamaConfig(**BASE)).train()).loss > 0


def test_trl_reads_the_logits() -> None:
    """SFTTrainer, before TRL 1.9, fails at None; the other trainers compute the loss from the logits."""
    model, batch = patch(make_model()), make_batch()
    with pytest.warns(
        UserWarning, match=r"its logits are None in training, but TRL's trainers read them; .*not patched"
    ):
        assert TRL["compute_loss"](model, **batch).logits is None
    with pytest.warns(UserWarning, match=r"without labels, so it computes its logits. TRL computes the loss"):
        assert TRL["compute_loss"](model, input_ids=batch["input_ids"]).logits.shape[-1] == V
    assert step(model).output.logits is None


def test_a_cross_entropy_of_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's cross_entropy=True replaces torch's for everybody."""
    model = patch(make_model())
    monkeypatch.setattr(F, "cross_entropy", LIGER["cross_entropy"])
    message = r"torch.nn.functional.cross_entropy: it is liger_kernel.* apply Liger with .*cross_entropy=False"
    with pytest.raises(ValueError, match=message):
        step(model)
    with pytest.raises(ValueError, match=message):
        patch(make_model())
