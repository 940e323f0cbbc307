"""Detection of other libraries that put their own forward or loss where a patched model has cce's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

#: Remedy for a library whose forward computes the loss itself, by its package's name.
REMEDIES = {
    "liger_kernel": (
        "apply Liger with fused_linear_cross_entropy=False and cross_entropy=False (Trainer: liger_kernel_config=), "
        "which leaves the loss to cce, or do not use patch"
    ),
    "trl": (
        "TRL computes the loss in its own way, without patch: train with transformers.Trainer, or "
        "give TRL a model that is not patched"
    ),
    "cut_cross_entropy": "use one of the two",
}


def chain(forward: Any) -> Iterator[Any]:
    """Yield ``forward`` and the functions inside it, as far as known: a method's function, a wrapper's wrapped one."""
    while forward is not None:
        yield forward
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)


def origin(function: Any) -> str:
    """Module a function was written in, as ``functools.wraps`` copies ``__module__``."""
    written: dict[str, Any] = getattr(getattr(function, "__func__", function), "__globals__", {})
    return str(written.get("__name__") or getattr(function, "__module__", None) or type(function).__module__)


def described(function: Any) -> str:
    """Name of a function with the module it was written in, for messages."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    name = getattr(code, "co_name", None) or getattr(function, "__qualname__", None) or type(function).__name__
    return f"{origin(function)}.{name}"


def foreign(forward: Any) -> Any:
    """Function of a library in :data:`REMEDIES` that ``forward`` is or wraps; None if there is none."""
    return next((f for f in chain(forward) if _library(f) in REMEDIES), None)


def remedy(forward: Any, otherwise: str) -> str:
    """Remedy for a library's forward; ``otherwise`` if the library is not known."""
    found = foreign(forward)
    return otherwise if found is None else REMEDIES[_library(found)]


def check_forward(owner: str, forward: Any) -> None:
    """Refuse a forward that computes its loss without the head's logits, which leaves cce nothing to take over.

    Raises:
        ValueError: the forward belongs to such a library.
    """
    found = foreign(forward)
    if found is not None:
        raise ValueError(
            f"model: the forward of {owner} is {described(found)}, which computes the loss itself, expected the "
            f"model's own; {REMEDIES[_library(found)]}"
        )


def check_loss() -> None:
    """Refuse a ``torch.nn.functional.cross_entropy`` that does not dispatch on its arguments, as torch's does.

    Raises:
        ValueError: a library has replaced it.
    """
    found = torch.nn.functional.cross_entropy
    if _library(found) in REMEDIES:
        raise ValueError(
            f"torch.nn.functional.cross_entropy: it is {described(found)}, expected torch's own, which a patched model "
            f"calls for its loss; {REMEDIES[_library(found)]}"
        )


def on_stack(*modules: str) -> bool:
    """Whether code of one of ``modules``, or of a package of this name, is running now."""
    frame = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__")) + "."
        if any(name.startswith(module + ".") for module in modules):
            return True
        frame = frame.f_back  # type: ignore[assignment]  # None above the first
    return False


def _library(function: Any) -> str:
    return origin(function).partition(".")[0]
