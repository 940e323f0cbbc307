"""Exceptions of the public interface."""

from __future__ import annotations


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run this problem; the message lists every reason."""
