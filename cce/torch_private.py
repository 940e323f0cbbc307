"""Operators as ``torch.library.custom_op`` makes them, without importing all of ``torch._dynamo`` at their first call.

That takes seconds, only to tell the compiler not to look inside, which here is told once there is a compiler. Nor is it
looked at in each call whether a result is one of the arguments: tests see to that (``torch.library.opcheck``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

# Private, and what custom_op calls: a module that is imported once more, as notebooks do, defines its operators anew.
from torch._library.custom_ops import get_library_allowing_overwrite

_libraries: dict[str, torch.library.Library] = {}


def operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorator of a function that changes no argument: it becomes the operator ``name``, on every device."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        namespace, short = name.split("::")
        library = _libraries[name] = get_library_allowing_overwrite(namespace, short)
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, lib=library, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", _unseen(function), lib=library)
        return getattr(getattr(torch.ops, namespace), short).default

    return make


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorator of a function that makes the results of the operator ``name`` without their values."""
    return torch.library.register_fake(name, lib=_libraries[name])


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Gives the operator ``name`` gradients; both functions as ``torch.library.register_autograd`` takes them."""
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_libraries[name])


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, into which torch.compile does not look."""
    disabled: Callable[..., Any] | None = None

    @wraps(function)
    def run(*arguments: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*arguments)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*arguments)

    return run
