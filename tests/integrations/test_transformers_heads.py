"""Heads that are more than a matrix: tied, with a bias, inside PEFT's layers; those that cannot be followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tiny_models import Step, V, assert_same_step, disturb, error, make_model, step

import cce
from cce.integrations.transformers import patch, unpatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT 0.21 asks transformers 5.24 by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def compare(model: Any, *, amp: bool = False, **options: Any) -> tuple[Step, Step]:
    """A step with and one without the patch."""
    expected = step(model, amp=amp)
    patch(model, **options)
    found = step(model, amp=amp)
    unpatch(model)
    assert found.output.logits is None and expected.output.logits is not None
    return found, expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
def test_tied_and_untied(family: str) -> None:
    """A tied weight gets the gradients of both of its uses."""
    norms = []
    for tied in (True, False):
        model = make_model(family, tie_word_embeddings=tied)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        found, expected = compare(model)
        assert_same_step(found, expected)
        norms.append(found.gradients.keys())
    assert len(norms[1]) == len(norms[0]) + 1


def test_bias() -> None:
    found, expected = compare(make_model("phi"))
    assert found.gradients["lm_head.bias"].norm() > 0.01
    assert_same_step(found, expected)


def products_of(model: Any) -> list[Any]:
    """What the head's stand-ins will stand for."""
    seen: list[Any] = []

    def look(head: Any, _: Any, output: Any) -> None:
        if hasattr(output, "product"):
            seen.append(output.product)

    model.get_output_embeddings().register_forward_hook(look)
    return seen


def make_lora(base: Any = None, adapters: int = 1, **options: Any) -> Any:
    """PEFT's model, with adapters that do something; the seeds of dropout are those of ``step``."""
    peft = pytest.importorskip("peft")
    model = make_model() if base is None else base
    config = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options}
    found = peft.get_peft_model(model, peft.LoraConfig(**config))
    for i in range(1, adapters):
        found.add_adapter(f"adapter{i}", peft.LoraConfig(**{**config, "r": 4 + i, "lora_alpha": 3}))
    found.base_model.set_adapter(list(found.peft_config))
    disturb((p for name, p in found.named_parameters() if "lora_B" in name or "embedding_A" in name), size=0.3)
    return found.train()


LORA: dict[str, dict[str, Any]] = {
    "blocks": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "blocks-and-head": {"target_modules": ["q_proj", "lm_head"]},
    "dropout": {"target_modules": ["lm_head"], "lora_dropout": 0.4},
    "embedding-and-head": {"target_modules": ["embed_tokens", "lm_head"]},
    "two-adapters": {"target_modules": ["q_proj", "lm_head"], "adapters": 2},
    "three-adapters": {"target_modules": ["lm_head"], "adapters": 3},
    "rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True},
    "head-saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", LORA)
def test_lora(name: str) -> None:
    found, expected = compare(make_lora(**LORA[name]))
    assert_same_step(found, expected)
    assert all(gradient.norm() > 1e-4 for gradient in found.gradients.values())


def test_lora_on_a_bias() -> None:
    """The head's own and LoRA's."""
    model = make_lora(make_model("phi"), target_modules=["lm_head"], lora_bias=True)
    found, expected = compare(model)
    assert any("lora_B" in name and name.endswith("bias") for name in found.gradients)
    assert_same_step(found, expected)


def test_lora_under_a_softcap() -> None:
    found, expected = compare(make_lora(make_model("gemma2", tie_word_embeddings=False), target_modules=["lm_head"]))
    assert_same_step(found, expected)


def test_lora_switched_off_and_merged() -> None:
    model = make_lora(target_modules=["lm_head"])
    with_adapter = step(model).loss
    for p in model.parameters():
        p.requires_grad_(True)  # else nothing is trained while the adapter is off
    with model.disable_adapter():
        found, expected = compare(model)
        assert_same_step(found, expected)
        assert error(found.loss, with_adapter) > 1e-3
    model.merge_adapter()
    found, expected = compare(model)
    assert_same_step(found, expected)
    assert error(found.loss, with_adapter) < 1e-5


def test_float32_lora_on_a_bf16_head() -> None:
    """As PEFT makes it. At most twice the error of the model's own loss, against float32."""
    model = make_lora(make_model().bfloat16(), target_modules=["lm_head"])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    seen = products_of(model)
    found, dense = compare(model)
    assert [(x.c.dtype, x.e.dtype, x.c.shape[1]) for x in seen] == [(torch.bfloat16, torch.bfloat16, 32 + 4)]
    exact = step(model.float())
    for name, gradient in exact.gradients.items():
        assert error(found.gradients[name], gradient) <= 2 * error(dense.gradients[name], gradient)
        assert found.gradients[name].dtype == torch.float32


def test_autocast() -> None:
    """The head's product is made in bf16, as F.linear would; weights and gradients are float32."""
    model = make_model()
    exact = step(model)
    seen = products_of(model)
    found, dense = compare(model, amp=True)
    assert [(x.c.dtype, x.e.dtype) for x in seen] == [(torch.bfloat16, torch.bfloat16)]
    assert found.loss.dtype == torch.float32
    for name, gradient in exact.gradients.items():
        assert 1e-4 < error(found.gradients[name], gradient) <= 2 * error(dense.gradients[name], gradient)


class Float32(nn.Linear):
    """A head that autocast does not reach."""

    def forward(self, x: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def test_a_head_without_autocast() -> None:
    """Nor does it reach the loss: a product in bf16 would be far from the model's own."""
    found, expected = compare(with_head(Float32(32, V, bias=False)), amp=True)
    assert error(found.loss, expected.loss) < 1e-6
    assert error(found.gradients["lm_head.weight"], expected.gradients["lm_head.weight"]) < 1e-5


def test_a_loss_of_bf16_logits_under_autocast() -> None:
    """BART does not cast its logits; autocast computes cross_entropy in float32."""
    found, expected = compare(make_model("bart"), amp=True)
    assert found.loss.dtype == expected.loss.dtype == torch.float32


@pytest.mark.parametrize("options", [{"use_dora": True}], ids=["dora"])
def test_other_variants_of_lora_are_refused(options: dict[str, Any]) -> None:
    model = make_lora(target_modules=["lm_head"], **options)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .* DoraLinearVariant.* expected plain LoRA"):
        patch(model)
    patch(make_lora(target_modules=["q_proj"], **options))  # elsewhere it may be anything


def test_a_variant_that_comes_after_the_patch_is_refused() -> None:
    base = patch(make_model())
    model = make_lora(base, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="expected plain LoRA"):
        step(model)


def test_ia3_scales_each_logit_and_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[])
    model = peft.get_peft_model(make_model(), config).train()
    patch(model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM calls mul\(logits \(3, 12, 203\), tensor \(203,\)\)"):
        step(model)


def test_prompt_learning() -> None:
    """PEFT puts virtual tokens and ignored labels before the others."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make_model(), config).train()
    found, expected = compare(model)
    assert_same_step(found, expected)


class Quantised(nn.Linear):
    """A layer whose weight is integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.mul(100).to(torch.int8), requires_grad=False)

    def forward(self, x: Any) -> Any:
        return x @ (self.weight.to(x.dtype) / 100).T


class Own(nn.Linear):
    """A layer that is linear, but by another way than F.linear."""

    def forward(self, x: Any) -> Any:
        return x @ self.weight.T


def with_head(head: nn.Module) -> Any:
    model = make_model()
    model.set_output_embeddings(head)
    return model


def test_a_quantised_head_is_refused() -> None:
    model = with_head(Quantised(nn.Linear(32, V)))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(Quantised\) is quantised \(torch.int8\)"):
        patch(model)


def test_a_head_without_a_linear_layer_is_refused() -> None:
    model = with_head(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, V)))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(Sequential\) has no torch.nn.Linear at its core"):
        patch(model)


def test_a_head_with_a_product_of_its_own_is_refused() -> None:
    model = patch(with_head(Own(32, V)))
    forward = model.lm_head.forward
    with pytest.raises(ValueError, match="the output head of LlamaForCausalLM returned Tensor"):
        step(model)
    assert model.lm_head.forward == forward and "forward" not in vars(model.lm_head)


def test_a_weight_that_is_no_plain_tensor_is_refused() -> None:
    class Packed(torch.Tensor):
        pass

    model = patch(make_model())
    del model.lm_head.weight
    model.lm_head.weight = torch.zeros(V, 32).as_subclass(Packed)
    with pytest.raises(ValueError, match=r"weight of LlamaForCausalLM is a .*Packed \(sharded or quantised\?\)"):
        step(model)


def test_a_weight_that_is_gone_before_the_loss() -> None:
    """As FSDP and ZeRO do with a head that is a unit of its own."""

    def release(head: Any, *_: Any) -> None:
        head.weight.untyped_storage().resize_(0)

    model = patch(make_model())
    model.lm_head.register_forward_hook(release)
    with pytest.raises(ValueError, match=r"weight of LlamaForCausalLM was released .* reshard_after_forward=False"):
        step(model)


def test_hooks_of_the_head_run() -> None:
    """Those of accelerate and FSDP, too: the head is called as ever."""
    model, seen = patch(make_model()), []
    model.lm_head.register_forward_hook(lambda head, args, output: seen.append((args[0].shape, output.shape)))
    step(model)
    assert seen == [((3, 12, 32), (3, 12, V))]


def test_the_vocabulary_can_be_resized() -> None:
    model = patch(make_model())
    model.resize_token_embeddings(V + 5)
    patched = step(model)
    assert_same_step(patched, step(unpatch(model)))
    assert patched.gradients["lm_head.weight"].shape == (V + 5, 32)


def test_the_spec() -> None:
    """Options reach cce.loss: a coarse filter without compensation errs visibly."""
    model = make_model().bfloat16()
    coarse = cce.Spec(filter="element", threshold=0.02, compensate=False, block_n=16, block_v=16)
    exact, _ = compare(model, spec=cce.Spec(filter="none"))
    filtered, _ = compare(model, spec=coarse)
    assert error(filtered.loss, exact.loss) < 1e-6
    assert error(filtered.gradients["lm_head.weight"], exact.gradients["lm_head.weight"]) > 0.01
