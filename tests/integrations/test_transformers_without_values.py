"""A patched model whose tensors have no values: sizes and dtypes, as of one that is not patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from tiny_models import BASE, make_batch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cce.integrations.transformers import patch

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).train()


def check_step(model: nn.Module, batch: Any) -> torch.Tensor:
    """A step of the patched model has the shapes of a step without the patch."""
    expected = model(**batch).loss
    output = patch(model)(**batch)
    assert output.logits is None
    loss: torch.Tensor = output.loss
    assert (loss.shape, loss.dtype, loss.device) == (expected.shape, expected.dtype, expected.device)
    loss.backward()
    for p in model.parameters():
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.device == p.device
    return loss


def test_meta() -> None:
    with torch.device("meta"):
        model = make_model()
    batch = {name: x.to("meta") for name, x in make_batch().items()}
    assert check_step(model, batch).is_meta


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        batch = {name: mode.from_tensor(x) for name, x in make_batch().items()}
        assert isinstance(check_step(make_model(), batch), FakeTensor)
