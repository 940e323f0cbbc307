"""The dead tiles' mass and the mean rows of ``c``, each in one pass over memory (cuda/compensation.cu)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong, c_void_p

import torch
from torch import Tensor

from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.launch import Arguments, Launch, strided
from cce.backends.cupy.module import Variant
from cce.backends.cupy.variants import DTYPES
from cce.backends.gpu.arrays import DeadMass
from cce.backends.problem import Problem
from cce.spec import Spec

_MEAN_THREADS, _MASS_THREADS, _MASS_EACH = 128, 256, 4


class MeanArguments(Arguments):
    """Arguments of mean_rows_kernel."""

    _fields_ = (
        ("c", c_void_p), ("pitch", c_longlong), ("order", c_void_p), ("out", c_void_p),
        *((name, c_int) for name in ("V", "pieces", "block_v", "first")),
    )  # fmt: skip


class MassArguments(Arguments):
    """Arguments of dead_mass_kernel."""

    _fields_ = (
        ("tile_mass", c_void_p), ("tile_entropy", c_void_p), ("pitch_mass", c_longlong), ("pitch_entropy", c_longlong),
        *((name, c_void_p) for name in ("live", "row_order", "lse", "entropy", "a", "h", "out")),
        ("softcap", c_float), *((name, c_int) for name in ("N", "V", "B", "block_n", "block_v", "first")),
    )  # fmt: skip


def mean_variant(gpu: Gpu, dtype: torch.dtype) -> Variant:
    """Variant of mean_rows."""
    return Variant("compensation.cu", "mean_rows_kernel", (("DTYPE", DTYPES[dtype]),), gpu.architecture, 0)


def mass_variant(gpu: Gpu, dtype: torch.dtype, entropy: bool, softcap: bool, half: bool) -> Variant:
    """Variant of dead_mass; ``half``: the maps are float16."""
    macros = {"DTYPE": DTYPES[dtype], "ENTROPY": entropy, "MAP_HALF": half, "SOFTCAP": softcap}
    given = tuple((key, int(value)) for key, value in macros.items() if value)
    return Variant("compensation.cu", "dead_mass_kernel", given, gpu.architecture, 0)


def mean_rows(spec: Spec, c: Tensor, order: Tensor | None, out: Tensor) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.mean_rows`."""
    size = c.element_size()
    pieces = c.shape[1] * size // 16
    arguments = MeanArguments(
        c=strided(c), pitch=c.stride(0) * size, order=order, out=out, V=len(c), pieces=pieces, block_v=spec.block_v,
        first=0,
    )  # fmt: skip
    grid = (len(out), -(-pieces // _MEAN_THREADS))
    Launch(mean_variant(Gpu.current(), c.dtype), grid, _MEAN_THREADS, arguments)()


def dead_mass(problem: Problem, spec: Spec, mass: DeadMass) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.dead_mass`."""
    rows, maps = mass.rows, mass.maps
    assert maps.tile_mass is not None
    entropy = maps.tile_entropy if rows.h is not None else None
    arguments = MassArguments(
        tile_mass=strided(maps.tile_mass), tile_entropy=strided(entropy), pitch_mass=maps.tile_mass.stride(0),
        pitch_entropy=0 if entropy is None else entropy.stride(0), live=mass.live, row_order=mass.row_order,
        lse=rows.lse, entropy=rows.entropy, a=rows.a, h=rows.h, out=mass.out, softcap=problem.softcap or 0.0,
        N=problem.n, V=problem.v, B=mass.live.shape[1], block_n=spec.block_n, block_v=spec.block_v, first=mass.first,
    )  # fmt: skip
    variant = mass_variant(
        Gpu.current(), problem.dtype, entropy is not None, problem.softcap is not None,
        maps.tile_mass.dtype == torch.float16,
    )  # fmt: skip
    grid = (len(mass.out), -(-problem.n // (_MASS_THREADS * _MASS_EACH)))
    Launch(variant, grid, _MASS_THREADS, arguments)()
