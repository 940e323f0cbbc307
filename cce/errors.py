"""Exceptions of the public interface."""

from __future__ import annotations

import reprlib
from typing import Any


class BackendUnavailable(RuntimeError):
    """Error for a problem that the requested backend cannot run; the message lists every reason."""


def describe(value: Any) -> str:
    """Describe a value briefly for an error message: arrays by shape and dtype, others abridged, with their type."""
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{reprlib.repr(value)} of type {kind}"
