"""The dead tiles' mass and the mean rows of ``c``, each in one pass over memory (cuda/compensation.cu)."""

from __future__ import annotations

from ctypes import c_int, c_longlong, c_void_p

import torch
from torch import Tensor

from cce.backends.cupy.arguments import Formula
from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.launch import Arguments, Launch
from cce.backends.cupy.module import Variant
from cce.backends.cupy.variants import DTYPES
from cce.problem import Maps, Outputs, Problem, Upstream
from cce.spec import Spec
from cce.worklist import WorkList

_MEAN_THREADS, _MASS_THREADS, _MASS_EACH = 128, 256, 4


class MeanArguments(Arguments):
    """Of mean_rows_kernel."""

    _fields_ = [  # noqa: RUF012
        ("c", c_void_p), ("pitch", c_longlong), ("order", c_void_p), ("out", c_void_p),
        *((name, c_int) for name in ("V", "pieces", "block_v", "first")),
    ]  # fmt: skip


class MassArguments(Arguments):
    """Of dead_mass_kernel."""

    _fields_ = [  # noqa: RUF012
        ("tile_mass", c_void_p), ("tile_entropy", c_void_p), ("pitch_mass", c_longlong), ("pitch_entropy", c_longlong),
        *((name, c_void_p) for name in ("live", "row_order", "lse", "entropy", "a", "h", "norm", "out")),
        ("formula", Formula), *((name, c_int) for name in ("N", "V", "B", "block_n", "block_v", "first")),
    ]  # fmt: skip


def mean_variant(gpu: Gpu, dtype: torch.dtype) -> Variant:
    """Of mean_rows."""
    return Variant("compensation.cu", "mean_rows_kernel", (("DTYPE", DTYPES[dtype]),), gpu.architecture, 0)


def mass_variant(gpu: Gpu, dtype: torch.dtype, entropy: bool, softcap: bool, half: bool) -> Variant:
    """Of dead_mass; ``half``: the maps are float16."""
    macros = {"DTYPE": DTYPES[dtype], "ENTROPY": entropy, "MAP_HALF": half, "SOFTCAP": softcap}
    given = tuple((key, int(value)) for key, value in macros.items() if value)
    return Variant("compensation.cu", "dead_mass_kernel", given, gpu.architecture, 0)


def mean_rows(c: Tensor, order: Tensor | None, block_v: int, t0: int, t1: int) -> Tensor:
    """(t1 - t0, D): see :meth:`cce.backends.gpu.kernels.Kernels.mean_rows`."""
    out = torch.empty(t1 - t0, c.shape[1], dtype=c.dtype, device=c.device)
    size = c.element_size()
    pieces = c.shape[1] * size // 16
    arguments = MeanArguments(
        c=c, pitch=c.stride(0) * size, order=order, out=out, V=len(c), pieces=pieces, block_v=block_v, first=t0
    )
    grid = (t1 - t0, -(-pieces // _MEAN_THREADS))
    Launch(mean_variant(Gpu.current(), c.dtype), grid, _MEAN_THREADS, arguments)()
    return out


def dead_mass(
    problem: Problem,
    spec: Spec,
    work: WorkList,
    forward: tuple[Outputs[Tensor], Maps[Tensor], Upstream[Tensor]],
    norm: Tensor | None,
    t0: int,
    t1: int,
) -> Tensor:
    """(t1 - t0, N): see :meth:`cce.backends.gpu.kernels.Kernels.dead_mass`."""
    outputs, maps, upstream = forward
    assert maps.tile_mass is not None and spec.block_n is not None and spec.block_v is not None
    live = work.live.T.contiguous()
    entropy = maps.tile_entropy if upstream.h is not None else None
    out = torch.empty(t1 - t0, problem.n, dtype=problem.dtype, device=live.device)
    arguments = MassArguments(
        tile_mass=maps.tile_mass, tile_entropy=entropy, pitch_mass=maps.tile_mass.stride(0),
        pitch_entropy=0 if entropy is None else entropy.stride(0), live=live, row_order=work.row_order,
        lse=outputs.lse.contiguous(), entropy=None if entropy is None else outputs.entropy,
        a=upstream.a.contiguous(), h=None if upstream.h is None else upstream.h.contiguous(), norm=norm, out=out,
        formula=Formula(scale=problem.logit_scale, softcap=problem.softcap or 0.0), N=problem.n, V=problem.v,
        B=live.shape[1], block_n=spec.block_n, block_v=spec.block_v, first=t0,
    )  # fmt: skip
    variant = mass_variant(
        Gpu.current(), problem.dtype, entropy is not None, problem.softcap is not None,
        maps.tile_mass.dtype == torch.float16,
    )  # fmt: skip
    grid = (t1 - t0, -(-problem.n // (_MASS_THREADS * _MASS_EACH)))
    Launch(variant, grid, _MASS_THREADS, arguments, [live])()
    return out
