"""Operators as ``torch.library.custom_op`` makes them, but for what a call of those imports: all of ``torch._dynamo``.

That takes seconds, only to tell the compiler not to look inside, which here is told once there is a compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorator of a function that changes no argument: it becomes the operator ``name``, on every device."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", _unseen(function))
        namespace, short = name.split("::")
        return getattr(getattr(torch.ops, namespace), short).default

    return make


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorator of a function that makes the results of the operator ``name`` without their values."""
    return torch.library.register_fake(name)


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
