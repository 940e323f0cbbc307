"""Gradients that were computed along with a loss and wait for its backward: no more than memory is meant for."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch

_lock = threading.RLock()  # a Held may be collected, and so leave, while another enters
_waiting: dict[torch.device, OrderedDict[int, weakref.ref[Held]]] = {}


class Held:
    """The gradients of one loss, until they are taken, or until later losses need the room.

    The newest loss of a device may always keep its gradients; earlier ones share ``budget`` with it. Those that do not
    fit any more are let go, oldest first, before the newest's are computed, so that they are never there together. What
    decides is the order of the calls and the losses that are still referred to, so a program does the same each time.

    Args:
        size: bytes of the gradients. budget: bytes that all that wait on ``device`` may take.
    """

    def __init__(self, size: int, budget: int, device: torch.device) -> None:
        self.size, self._device, self._gradients = size, device, None
        with _lock:
            line = _waiting.setdefault(device, OrderedDict())
            if line:
                _make_room(line, size, budget)
            line[id(self)] = weakref.ref(self)

    def keep(self, gradients: Any) -> None:
        """Hold ``gradients``, unless later losses have needed the room."""
        with _lock:
            if id(self) in _waiting.get(self._device, ()):
                self._gradients = gradients

    def take(self) -> Any:
        """The gradients, which are then held no longer; None if they are not held (any more)."""
        gradients, self._gradients = self._gradients, None
        with _lock:
            _waiting.get(self._device, OrderedDict()).pop(id(self), None)
        return gradients

    def __del__(self) -> None:
        self.take()


def _make_room(line: OrderedDict[int, weakref.ref[Held]], size: int, budget: int) -> None:
    """Let go of the oldest in ``line`` until ``size`` bytes more are within the budget."""
    others = [found for found in (ref() for ref in line.values()) if found is not None]
    total = size + sum(other.size for other in others)
    for other in others:
        if total <= budget:
            break
        total -= other.size
        other.take()
