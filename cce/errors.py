"""Exceptions of the public interface."""

from __future__ import annotations

import reprlib
from typing import Any


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run this problem; the message lists every reason."""


def describe(value: Any) -> str:
    """A short text for an error message: arrays by shape and dtype, other values abridged and with their type."""
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{reprlib.repr(value)} of type {kind}"
