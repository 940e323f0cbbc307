"""A watch over a patched model, for another forward that replaces the patched one and computes the loss."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cce.integrations.transformers.others import chain, described, foreign, on_stack, remedy

#: Attribute of a patched function, class or model that holds the state ``unpatch`` needs.
MARK = "_cce_patch"


class Watch:
    """A hook on a patched model's backbone, which runs however the loss is computed.

    A hook on the model itself would be skipped: PEFT calls a model's forward, not the model.

    Attributes:
        model: a weak reference; None in a copy of the backbone alone.
        handle: handle that removes the hook.
        warned: whether the warning was given; once is enough.
    """

    def __init__(self) -> None:
        self.model: weakref.ref[nn.Module] | None = None
        self.handle: RemovableHandle | None = None
        self.warned = False

    def attach(self, model: nn.Module) -> None:
        """Start watching ``model``, which is patched."""
        backbone = getattr(model, "base_model", model)
        self.model, self.handle = weakref.ref(model), backbone.register_forward_pre_hook(self)

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def __call__(self, backbone: nn.Module, args: Any) -> None:
        if self.warned or not (backbone.training and torch.is_grad_enabled()):
            return
        model = None if self.model is None else self.model()
        if model is not None and model.__dict__.get("forward") is not model.__dict__.get(MARK, self):
            self.look(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch says no type of it
    def look(self, model: nn.Module) -> None:
        """Warn, unless a wrapper has called the patched forward."""
        patched: Any = getattr(model, MARK, None)  # instances have that of their class
        # A wrapper that refers to the patched forward calls it, except TRL's. (Compiled code may have no frame of it.)
        told = is_inside(patched, model.forward) and not foreign(model.forward)
        if patched is None or told or on_stack(f"{__package__}.forward", f"{__package__}.step"):
            return
        self.warned = True
        warnings.warn(
            f"{type(model).__name__} is patched by cce, but {described(model.forward)} replaced its forward "
            f"afterwards: cce does not compute its loss, and the options of patch ({getattr(patched, MARK).options}) "
            f"have no effect; {remedy(model.forward, 'patch the model after that, or do not use patch')}",
            stacklevel=2,
        )

    def __getstate__(self) -> dict[str, Any]:
        """State without the model, which a copy of the backbone must not hold; a copied model's forward sets it."""
        return {**vars(self), "model": None}


def is_inside(patched: Any, forward: Callable[..., Any]) -> bool:
    """Whether ``forward`` is, or wraps, the function of a patched forward."""
    function = getattr(patched, "__func__", patched)
    return any(f is function for f in chain(forward))


def watch_instance(model: nn.Module) -> None:
    """Watch an instance of a patched class whose forward is not the class's."""
    backbone = getattr(model, "base_model", model)
    if not any(isinstance(hook, Watch) for hook in backbone._forward_pre_hooks.values()):
        Watch().attach(model)
