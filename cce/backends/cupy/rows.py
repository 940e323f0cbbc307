"""Copies of rows and maps into and out of the work list's order, each in one pass over memory (cuda/rows.cu)."""

from __future__ import annotations

import math
from ctypes import c_float, c_int, c_longlong, c_void_p

import torch
from torch import Tensor

from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.launch import Arguments, Launch, strided
from cce.backends.cupy.module import Variant
from cce.backends.cupy.variants import DTYPES
from cce.backends.gpu.arrays import Splits, Tiles
from cce.backends.gpu.sizes import ALIGNMENT, cdiv
from cce.backends.problem import LEAST_HIT, Maps
from cce.spec import Spec

_THREADS, _JOIN_THREADS, _FILL_THREADS, _FILL_TILES = 128, 64, 256, 16


class GatherArguments(Arguments):
    """Arguments of gather_rows_kernel."""

    _fields_ = (
        *((name, c_void_p) for name in ("e", "row_order", "keep", "out")), ("pitch", c_longlong),
        ("N", c_int), ("pieces", c_int),
    )  # fmt: skip


class ScatterArguments(Arguments):
    """Arguments of scatter_rows_kernel."""

    _fields_ = (
        *((name, c_void_p) for name in ("total", "norm", "row_order", "out")), ("pitch", c_longlong),
        ("N", c_int), ("D", c_int),
    )  # fmt: skip


class FillArguments(Arguments):
    """Arguments of fill_maps_kernel."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "tile_max", "tile_log_sum", "tile_entropy", "lse", "lse_low", "in_use", "mass", "entropy",
        )),
        ("pitch_mass", c_longlong), ("pitch_entropy", c_longlong), ("log_threshold", c_float), ("least", c_float),
        *((name, c_int) for name in ("by_maximum", "N", "T")),
    )  # fmt: skip


class JoinArguments(Arguments):
    """Arguments of joined_kernel."""

    _fields_ = (
        *((name, c_void_p) for name in ("max", "sum", "target_logits", "targets", "in_use", "lse", "lse_low", "nll")),
        *((name, c_int) for name in ("N", "S", "K")),
    )  # fmt: skip


def rows_variant(gpu: Gpu, name: str, dtype: torch.dtype = torch.bfloat16, half: bool = False) -> Variant:
    """Variant of a kernel of rows.cu; ``dtype``: that of the result; ``half``: the maps are float16."""
    given = tuple((key, value) for key, value in (("DTYPE", DTYPES[dtype]), ("MAP_HALF", int(half))) if value)
    return Variant("rows.cu", f"{name}_kernel", given, gpu.architecture, 0)


def gather_rows(e: Tensor, row_order: Tensor, keep: Tensor | None, out: Tensor) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.gather_rows`."""
    size = e.element_size()
    arguments = GatherArguments(
        e=strided(e), row_order=row_order, keep=keep, out=out, pitch=e.stride(0) * size // ALIGNMENT, N=len(out),
        pieces=e.shape[1] * size // ALIGNMENT,
    )  # fmt: skip
    Launch(rows_variant(Gpu.current(), "gather_rows"), len(out), _THREADS, arguments)()


def scatter_rows(total: Tensor, norm: Tensor | None, row_order: Tensor, out: Tensor) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.scatter_rows`."""
    arguments = ScatterArguments(
        total=strided(total), norm=norm, row_order=row_order, out=out, pitch=total.stride(0), N=len(out), D=out.shape[1]
    )
    Launch(rows_variant(Gpu.current(), "scatter_rows", out.dtype), len(out), _THREADS, arguments)()


def joined(splits: Splits, target_logits: Tensor, targets: Tensor, in_use: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.joined`."""
    number, n = splits.max.shape
    lse, lse_low = torch.empty_like(splits.max[0]), torch.empty_like(splits.max[0])
    nll, targets, in_use = torch.empty_like(target_logits), targets.contiguous(), in_use.contiguous()
    arguments = JoinArguments(
        max=splits.max, sum=splits.sum, target_logits=target_logits, targets=targets, in_use=in_use, lse=lse,
        lse_low=lse_low, nll=nll, N=n, S=number, K=targets.shape[1],
    )  # fmt: skip
    Launch(rows_variant(Gpu.current(), "joined"), cdiv(n, _JOIN_THREADS), _JOIN_THREADS, arguments)()
    return lse, lse_low, nll


def fill_maps(spec: Spec, lse: Tensor, lse_low: Tensor, in_use: Tensor, tiles: Tiles, maps: Maps[Tensor]) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.fill_maps`."""
    mass, entropy = maps.tile_mass, maps.tile_entropy
    assert mass is not None and spec.threshold is not None
    number, n = mass.shape
    in_use, lse, lse_low = in_use.contiguous(), lse.contiguous(), lse_low.contiguous()
    arguments = FillArguments(
        tile_max=tiles.max, tile_log_sum=tiles.log_sum, tile_entropy=tiles.entropy, lse=lse, lse_low=lse_low,
        in_use=in_use, mass=strided(mass), entropy=strided(entropy), pitch_mass=mass.stride(0),
        pitch_entropy=0 if entropy is None else entropy.stride(0), log_threshold=math.log(spec.threshold),
        least=LEAST_HIT, by_maximum=spec.filter == "element", N=n, T=number,
    )  # fmt: skip
    variant = rows_variant(Gpu.current(), "fill_maps", half=mass.dtype == torch.float16)
    Launch(variant, (cdiv(n, _FILL_THREADS), cdiv(number, _FILL_TILES)), _FILL_THREADS, arguments)()
