"""One training step of a patched model: its forward, without the logits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from cce.integrations.transformers.heads import find_head, is_replaced, without_logits
from cce.integrations.transformers.logits import Call, Logits
from cce.integrations.transformers.others import REMEDIES, check_loss, on_stack
from cce.integrations.transformers.state import Patch


@torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # torch says no type of it
def train(model: nn.Module, patched: Patch, args: Any, kwargs: Any) -> Any:
    """Run the forward without logits; torch.compile skips this function and compiles those it calls, up to the head."""
    head = find_head(model)
    if is_replaced(head):  # by a patched forward that called this one as super().forward
        return patched.original(model, *args, **kwargs)
    check_loss()
    _warn_of_trl(patched, type(model).__name__)
    call = Call(type(model).__name__, patched.options)
    with without_logits(head, call):
        output = patched.original(model, *args, **kwargs)
    return _finished(output, call)


def warn_of_logits(patched: Patch, owner: str) -> None:
    """Warn once about a training step without labels."""
    if "labels" in patched.warned:
        return
    patched.warned.add("labels")
    cause = (
        f"{REMEDIES['trl']}."
        if on_stack("trl")
        else "Trainer takes the labels away with compute_loss_func, and with label_smoothing_factor: use "
        "patch(model, label_smoothing=...) instead of that."
    )
    warnings.warn(
        f"{owner} is patched by cce, but was called in training without labels, so it computes its logits. {cause}",
        stacklevel=3,
    )


def _warn_of_trl(patched: Patch, owner: str) -> None:
    """Warn before TRL's trainers (SFTTrainer before TRL 1.9) fail on missing logits with ``None has no ...``."""
    if "trl" in patched.warned:
        return
    patched.warned.add("trl")
    if on_stack("trl"):
        warnings.warn(
            f"{owner} is patched by cce, so its logits are None in training, but TRL's trainers read them; "
            f"{REMEDIES['trl']}",
            stacklevel=4,
        )


def _finished(output: Any, call: Call) -> Any:
    """Replace the stand-in in ``output`` by None."""
    if not call.losses:
        raise ValueError(
            f"model: {call.owner} got labels but computed no loss from its head's logits by "
            "torch.nn.functional.cross_entropy, expected a causal language model's loss"
        )
    if isinstance(output, tuple):
        return tuple(None if isinstance(x, Logits) else x for x in output)
    # Make a new one: a ModelOutput's items and attributes are set when it is made.
    return type(output)(**{key: None if isinstance(x, Logits) else x for key, x in output.items()})
