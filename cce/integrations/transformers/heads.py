"""A model's output head: finding it, checking that it is supported, and calling it without the logits.

The head's own forward runs, whatever wraps it. Meanwhile, ``F.linear`` with a weight of V rows returns a stand-in
instead of a product. So LoRA on the head needs no code here: PEFT's layer adds the stand-in of ``x w^T`` to that of
``dropout(x) a^T b^T``, for any number of active adapters, and adds nothing where they are merged or switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cce.frontend.checks import FLOATS
from cce.frontend.flatten import autocast
from cce.integrations.transformers.logits import Call, Logits
from cce.integrations.transformers.product import Product
from cce.torch_private import fake_tensor_type


def find_head(model: nn.Module) -> nn.Module:
    """Find the module that makes the logits.

    Raises:
        ValueError: there is none, or it is not a linear layer with a weight of plain numbers; the message says which.
    """
    owner = type(model).__name__
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is None:
        raise ValueError(
            f"model: {owner} has no output head (get_output_embeddings() gives None), expected a linear one"
        )
    reason = unsupported(head)
    if reason:
        raise ValueError(f"model: the output head of {owner} ({type(head).__name__}) {reason}")
    return head


def unsupported(head: nn.Module) -> str | None:
    """Reason why the products of ``head`` cannot be followed; None if they can."""
    linear = innermost(head)
    if not isinstance(linear, nn.Linear):
        return f"has no torch.nn.Linear at its core but a {type(linear).__name__}, expected a linear head"
    if linear.weight.dtype not in FLOATS:
        return f"is quantised ({linear.weight.dtype}), expected bfloat16, float16, float32 or float64"
    variants = sorted(
        {type(x).__name__ for layer in _layers(head) for x in getattr(layer, "lora_variant", {}).values()}
    )
    if variants:
        return f"has a {', '.join(variants)}, which is no sum of low-rank products, expected plain LoRA"
    return None


def innermost(head: nn.Module) -> nn.Module:
    """Layer inside PEFT's wrappers."""
    return list(_layers(head))[-1]


def _layers(head: nn.Module) -> Iterator[nn.Module]:
    layer: nn.Module | None = head
    while layer is not None:
        yield layer
        # LoraLayer, or ModulesToSaveWrapper, whose copy in training has the shape of the original.
        layer = layer._modules.get("base_layer") or layer._modules.get("original_module")


@contextmanager
def without_logits(head: nn.Module, call: Call) -> Iterator[None]:
    """Context in which ``head`` returns :class:`Logits`.

    The head's attribute ``forward`` is replaced, not hooked: a DataParallel replica shares its hooks with all others.
    """
    had, own = "forward" in head.__dict__, head.__dict__.get("forward")
    # An object, not a function: torch.compile compiles the model anew for each new function.
    head.__dict__["forward"] = _Forward(head.forward, innermost(head), call)
    try:
        yield
    finally:
        if had:
            head.__dict__["forward"] = own
        else:
            del head.__dict__["forward"]


def is_replaced(head: nn.Module) -> bool:
    """Whether ``head`` is already inside :func:`without_logits`."""
    return isinstance(head.__dict__.get("forward"), _Forward)


@dataclass
class _Forward:
    """Forward of a head during a call of its model."""

    forward: Callable[..., Any]
    linear: nn.Module
    call: Call

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch says no type of it
    def __call__(self, *args: Any, **kwargs: Any) -> Logits:
        with _Products(self.linear, self.call):
            found = self.forward(*args, **kwargs)
        if not isinstance(found, Logits):
            raise ValueError(
                f"model: the output head of {self.call.owner} returned {type(found).__name__}, expected a product by "
                "torch.nn.functional.linear with a weight of one row per vocabulary entry"
            )
        return found


class _Products(TorchFunctionMode):
    """Mode in which products with a weight of V rows become stand-ins, and everything else is computed."""

    def __init__(self, linear: nn.Module, call: Call) -> None:
        super().__init__()
        self.rows: Any = linear.out_features
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            found = self.product(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))

    def product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Logits | None:
        if weight.ndim != 2 or weight.shape[0] != self.rows or isinstance(input, Logits):
            return None
        if type(weight) not in (Tensor, nn.Parameter, fake_tensor_type()):  # the last has shapes only
            kind = f"{type(weight).__module__}.{type(weight).__name__}"
            raise ValueError(
                f"model: the head's weight of {self.call.owner} is a {kind} (sharded or quantised?), "
                "expected a plain tensor with all rows when the head is called"
            )
        e, c, bias = autocast(input, weight, bias)
        return Logits(Product(e, c, bias), torch.promote_types(e.dtype, c.dtype), self.call)
