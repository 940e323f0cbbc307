"""Small random language models of transformers, and one training step of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

V = 203
LENGTH = 12
BASE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Each family's model, the prefix of its configuration, and what differs from BASE.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "Llama", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3", {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2", {"head_dim": 8, "final_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3Text", {"head_dim": 8, "final_logit_softcapping": 1.5}),
    "mistral": ("MistralForCausalLM", "Mistral", {}),
    "phi3": ("Phi3ForCausalLM", "Phi3", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2", {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoX", {}),
    "cohere": ("CohereForCausalLM", "Cohere", {"logit_scale": 0.4}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2", {}),
    "mixtral": ("MixtralForCausalLM", "Mixtral", {"num_local_experts": 4, "output_router_logits": True}),
    # Not asked for, but other forms of a head: divided logits, a bias, a loss of its own that does not shift.
    "granite": ("GraniteForCausalLM", "Granite", {"logits_scaling": 3.0}),
    "phi": ("PhiForCausalLM", "Phi", {}),
    "bart": (
        "BartForCausalLM",
        "Bart",
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "dropout": 0.0},
    ),
}


class Step(NamedTuple):
    """Of one training step."""

    output: Any
    loss: Tensor
    gradients: dict[str, Tensor]


def make_class(family: str) -> type[Any]:
    found: type[Any] = getattr(transformers, FAMILIES[family][0])
    return found


def make_model(family: str = "llama", **changes: Any) -> Any:
    """In training, with weights large enough that the logits differ."""
    _, prefix, of_family = FAMILIES[family]
    config = getattr(transformers, prefix + "Config")(**{**BASE, **of_family, **changes})
    torch.manual_seed(0)
    model = make_class(family)(config).train()
    disturb(model.parameters())
    return model


@torch.no_grad()
def disturb(parameters: Any, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.add_(torch.randn(p.shape, generator=generator).mul_(size).to(p.dtype))


def make_batch(rows: int = 3) -> dict[str, Tensor]:
    """Tokens; of the labels some are ignored, in each row others."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, V, (rows, LENGTH), generator=generator)
    labels = tokens.clone()
    for row in range(rows):
        labels[row, : 2 * row] = -100
    labels[0, 5:7] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model: nn.Module, *, amp: bool = False, **inputs: Any) -> Step:
    """Forward (with ``amp`` under autocast) and backward; the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        output = model(**{**make_batch(), **inputs})
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(output, output.loss.detach(), gradients)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, by the norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_same_step(found: Step, expected: Step, tolerance: float = 1e-5) -> None:
    """Loss and every gradient."""
    assert found.loss.dtype == expected.loss.dtype and found.loss.shape == expected.loss.shape
    errors = {"loss": error(found.loss, expected.loss)}
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        # The softmax over keys does not change with a bias of all keys: the gradient is rounding alone.
        if not (name.endswith("k_proj.bias") and gradient.norm() < 1e-6):
            errors[name] = error(found.gradients[name], gradient)
    assert max(errors.values()) <= tolerance, errors
