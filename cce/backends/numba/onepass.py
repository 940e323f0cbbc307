"""Loss and gradients in one pass: the kernels of ``kernels/onepass.py`` behind ``OnePassKernels``."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.kernels import Formula
from cce.backends.gpu.onepass_kernels import OnePassKernels
from cce.backends.gpu.sizes import cdiv
from cce.backends.numba.choice import KINDS, gpu_of, store_tile
from cce.backends.numba.launch import Kernel, driver_of, simulated
from cce.backends.numba.operands import pieces_of, pitch_of
from cce.backends.numba.options import Targets
from cce.backends.numba.tile import Tile


@dataclass(frozen=True)
class Store:
    """What ``store_tiles`` is compiled for."""

    tile: Tile
    bias: bool
    scale: bool
    group: int = 16


@dataclass(frozen=True)
class Join:
    """What ``join`` is compiled for: rows of a block, threads of a row."""

    width: int
    parts: int


@dataclass(frozen=True)
class Simple:
    """What the others are compiled for: the kind of the numbers, threads of a block; rows of a thread."""

    threads: int
    kind: str = "ieee"
    rows: int = 8
    mean: bool = False


class Repeated:
    """A kernel launched again and again: addresses and numbers are packed, nothing else is done."""

    def __init__(self, kernel: Kernel) -> None:
        self._device = torch.cuda.current_device()
        function, layout = kernel.function(self._device)
        packer = struct.Struct("<" + layout)
        self._memory, self._pack, self._lock = bytearray(packer.size), packer.pack_into, threading.Lock()
        self._view = ctypes.c_char.from_buffer(self._memory)
        base = ctypes.addressof(self._view)
        self._places = (ctypes.c_void_p * (packer.size // 8))(*range(base, base + packer.size, 8))
        self._head, self._address = (1, 1, kernel.threads, 1, 1, kernel.shared), ctypes.addressof(self._places)
        self._function, self._launch = function, driver_of().cuLaunchKernel

    def __call__(self, grid: int, *arguments: Any) -> None:
        numbers = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments]
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        with self._lock:  # autograd's threads may come at the same time
            self._pack(self._memory, 0, *numbers)
            (error,) = self._launch(self._function, grid, *self._head, stream, self._address, 0)
        if error.value:
            raise RuntimeError(f"cce: the CUDA driver returned {error!r} for a kernel of the numba backend")


@lru_cache(maxsize=256)
def _kernel(name: str, options: Any, threads: int, shared: int, resident: int, device: int) -> Callable[..., None]:
    kernel = Kernel(maker(name), options, threads, shared, resident)
    return kernel if simulated() else Repeated(kernel)


def maker(name: str) -> str:
    """Where the function is that makes a kernel."""
    return f"{'targets' if name == 'targets' else 'onepass'}.make_{name}"


class NumbaOnePass(OnePassKernels):
    """Compiled for the options of a call, when it is made."""

    def __init__(self) -> None:
        self._threads = 4 if simulated() else 256

    def columns(self, dtype: torch.dtype) -> int:
        return self._tile(dtype, False).columns

    def _tile(self, dtype: torch.dtype, ieee: bool) -> Tile:
        kind = KINDS.get(dtype) or ("ieee" if ieee else "tf32")
        return store_tile(kind, gpu_of("cpu" if simulated() else "cuda"))

    def prepare(self, targets: Tensor, v: int, ignore_index: int, out: Tensor, weights: Tensor | None) -> None:
        wide, good = targets.to(torch.int64), targets.new_empty((), dtype=torch.int32)
        options = Simple(self._threads, mean=weights is not None)
        launch = _kernel("prepare", options, self._threads, 4 * self._threads, 1, targets.get_device())
        launch(1, wide, out, weights, good, wide.numel(), v, ignore_index)
        if good.is_cuda:
            torch._assert_async(good, "cce: a target outside [0, V) that is not ignore_index")

    def target_logits(
        self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor, used_e: Tensor | None
    ) -> None:
        warps = 1 if simulated() else 4
        options = Targets(
            KINDS.get(e.dtype, "ieee"), KINDS.get(c.dtype, "ieee"), bias=formula.bias is not None,
            scale=formula.scale != 1, warps=warps, copy=used_e is not None,
        )  # fmt: skip
        launch = _kernel("targets", options, 32 * warps, 0, 1, e.get_device())
        launch(
            1 if simulated() else cdiv(targets.numel(), warps), e, c, formula.bias, targets, out, used_e, len(e),
            targets.shape[1], e.shape[1], *e.stride(), *c.stride(), formula.scale, 0.0,
        )  # fmt: skip

    def store(self, e: Tensor, c: Tensor, formula: Formula, q: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
        tile, programs = self._tile(e.dtype, formula.ieee), gpu_of(e.device.type).programs or 2
        options = Store(tile, formula.bias is not None, formula.scale != 1)
        shared = tile.stages * tile.stage_bytes
        launch = _kernel("store_tiles", options, tile.threads, shared, tile.resident, e.get_device())
        grid = min(cdiv(len(e), tile.rows) * cdiv(len(c), tile.columns), programs * tile.resident)
        launch(
            grid, e, c, formula.bias, q, tile_max, tile_sum, len(e), len(c), pieces_of(e), pitch_of(e), pitch_of(c),
            q.stride(0), formula.scale,
        )  # fmt: skip

    def join(self, tile_max: Tensor, tile_sum: Tensor, target_logits: Tensor, targets: Tensor, lse: Tensor) -> None:
        width = min(32, self._threads)
        options, (n, k) = Join(width, 2 if simulated() else 16), targets.shape
        threads = width * options.parts
        launch = _kernel("join", options, threads, 8 * threads, 1, lse.get_device())
        launch(cdiv(n, width), tile_max, tile_sum, target_logits, targets, lse, n, k, len(tile_max))

    def scale(
        self, q: Tensor, tile_max: Tensor, lse: Tensor, target_logits: Tensor, targets: Tensor, a: Tensor, g: Tensor
    ) -> None:
        options, (n, v) = Simple(self._threads, KINDS.get(q.dtype, "ieee")), q.shape
        launch = _kernel("scale", options, self._threads, 0, 1, q.get_device())
        groups = cdiv(n, options.rows)
        launch(
            cdiv(v, 2 * self._threads) * groups, q, tile_max, lse, target_logits, targets, a, g, n, v, g.shape[1],
            q.stride(0), self.columns(q.dtype), a.stride(0), groups,
        )  # fmt: skip

    def value(self, weights: Tensor, lse: Tensor, target_logits: Tensor, out: Tensor) -> None:
        launch = _kernel("value", Simple(self._threads), self._threads, 4 * self._threads, 1, lse.get_device())
        launch(1, weights, lse, target_logits, out, weights.numel(), weights.shape[1])

    def multiply(self, x: Tensor, y: Tensor | None, factor: Tensor) -> None:
        for each in (x, y):
            if each is not None:
                options = Simple(self._threads, KINDS.get(each.dtype, "ieee"))
                launch = _kernel("multiply", options, self._threads, 0, 1, each.get_device())
                launch(max(1, min(2048, cdiv(each.numel(), 8 * self._threads))), each, factor, each.numel())
