"""Shared state of the kernels of one call: operands, flags, and the launch configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from cce.backends.gpu.sizes import Blocks
from cce.backends.problem import Inputs, Problem
from cce.backends.triton.choice import choose
from cce.backends.triton.launch import Device, Launch, Tile
from cce.backends.triton.operands import dot_dtype, matrix, needs_wide, tma_ready
from cce.spec import Spec

INTERPRETED = triton.knobs.runtime.interpret


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the device; that of sm_90 in the interpreter."""
    return (9, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of the device; 2 in the interpreter, which runs programs one after the other."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def device_name(device: torch.device) -> str:
    """Name of the device's model."""
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)


def float32_precision() -> str:
    """Precision of float32 products, from torch.get_float32_matmul_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def gpu_of(device: torch.device) -> Device:
    """Properties of the device on which a configuration depends."""
    return Device(device_name(device), capability(device), multiprocessors(device), float32_precision())


_imposed: ContextVar[Launch | None] = ContextVar("launch", default=None)


@contextmanager
def launched_with(launch: Launch) -> Iterator[None]:
    """Context in which all calls of this thread use this configuration, whatever the problem; for trials."""
    token = _imposed.set(launch)
    try:
        yield
    finally:
        _imposed.reset(token)


@dataclass(frozen=True)
class Call(Blocks):
    """A problem on a device.

    Attributes:
        e, c, bias: operands as given, rows in use only; ``e`` is widened where ``c`` is wider.
        order: (V,) vocabulary order or None.
        launch: launch configuration.
    """

    launch: Launch
    e: Tensor
    c: Tensor
    bias: Tensor | None
    order: Tensor | None
    precision: str

    @classmethod
    def of(cls, inputs: Inputs[Tensor], problem: Problem, spec: Spec) -> Call:
        e = inputs.e if inputs.rows is None else inputs.e.index_select(0, inputs.rows)
        launch, gpu = _imposed.get(), gpu_of(e.device)
        if launch is None:
            # Leave out the vocabulary order: a cache would compare its values, and so wait for them.
            launch = choose(problem, Spec.from_key(spec.key), gpu, inputs.vocab_order is not None)
        return cls(problem, spec, launch, e.to(problem.dtype), inputs.c, inputs.bias, inputs.vocab_order, gpu.precision)

    @property
    def softcap(self) -> float:
        return self.problem.softcap or 1.0

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.e.new_empty(shape, dtype=dtype)

    def formula(self) -> dict[str, Any]:
        """Kernel flags for the formula that turns a product into a logit."""
        return {
            "BIAS": self.bias is not None,
            "SCALE": self.problem.logit_scale != 1.0,
            "SOFTCAP": self.problem.softcap is not None,
        }

    def e_tma(self, e: Tensor) -> bool:
        return self.launch.tma and tma_ready(e)

    @property
    def c_tma(self) -> bool:
        """Whether tiles of ``c`` are boxes of the matrix: entries in natural order, in the products' dtype."""
        same = self.c.dtype == self.problem.dtype
        return self.launch.tma and self.order is None and same and tma_ready(self.c)

    def operands(self, tile: Tile, e: Tensor, c_rows: int | None = None, gather: bool = False) -> dict[str, Any]:
        """Kernel arguments and flags for a tile of logits.

        Args:
            tile: tile of the product.
            e: (rows, D).
            c_rows: rows of a box of ``c``; None stands for the tile's columns.
            gather: whether rows of ``c`` are read one by one, from anywhere.
        """
        e_tma, c_tma = self.e_tma(e), self.c_tma and not gather
        return {
            "e": matrix(e, tile.rows, tile.depth, e_tma),
            "c": matrix(self.c, c_rows or tile.columns, tile.depth, c_tma),
            "bias": self.bias,
            "D": self.problem.d,
            "stride_en": e.stride(0),
            "stride_ed": e.stride(1),
            "stride_cv": self.c.stride(0),
            "stride_cd": self.c.stride(1),
            "scale": self.problem.logit_scale,
            "softcap": self.softcap,
            "E_TMA": e_tma,
            "C_TMA": c_tma,
            "EVEN_D": self.problem.d % tile.depth == 0,
            "DOT": dot_dtype(self.problem.dtype),
            "PRECISION": self.precision,
            "WIDE": needs_wide(self.c) or needs_wide(e),
            **self.formula(),
        }
