"""The kernels a call would launch on a GPU, found without one: the host code runs on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

import cce
from cce.backends.numba import launches as run
from cce.backends.numba import live
from cce.backends.numba.choice import GPU
from cce.backends.numba.launch import Kernel

A100, H100, B200 = GPU((8, 0), 108), GPU((9, 0), 132), GPU((10, 0), 148)


@contextmanager
def recorded(gpu: GPU) -> Iterator[list[Kernel]]:
    """Whatever is launched within goes to the list, once, and is not run: results are what memory held."""
    found: list[Kernel] = []

    def keep(kernel: Kernel, grid: int, *arguments: Any) -> None:
        if not any(kernel.make == x.make and kernel.options == x.options for x in found):
            found.append(kernel)

    def prepare(kernel: Kernel, grid: int, *arguments: Any) -> Any:
        return lambda *last: keep(kernel, grid)

    with (
        patch.object(Kernel, "__call__", keep),
        patch.object(Kernel, "prepare", prepare),
        patch.object(live, "prepare_all", lambda launches: [prepare(*x[:2]) for x in launches]),
        patch.object(run, "gpu_of", lambda device: gpu),
        patch("cce.backends.numba.backend.NumbaBackend.unavailable", lambda self, device: []),
    ):
        yield found


def kernels_of_loss(
    gpu: GPU, n: int, d: int, v: int, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> list[Kernel]:
    """Those of a loss and its gradients."""
    e = torch.zeros(n, d, dtype=dtype, requires_grad=True)
    c = torch.zeros(v, d, dtype=dtype, requires_grad=True)
    with recorded(gpu) as found:
        cce.loss(e, c, torch.zeros(n, dtype=torch.int64), backend="numba", **options).backward()
    return found
