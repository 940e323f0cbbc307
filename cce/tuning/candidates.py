"""Tiles worth trying: a short list for each kernel and kind of operand.

The lists hold the shipped tiles, tiles that came close to them or may win on a GPU with other proportions, and tiles
that fit where shared memory is small. Not all of them compile for every GPU; the tuner finds out.
"""

from __future__ import annotations

import torch

from cce.backends.problem import Problem
from cce.backends.triton.launch import Device, Launch, Tile, fitted
from cce.spec import Spec

_FORWARD = (
    Tile(128, 256, 64, stages=4, flatten=True),
    Tile(128, 256, 64, stages=3, flatten=True),
    Tile(128, 256, 64, stages=4),
    Tile(128, 256, 64, stages=3),
    Tile(256, 128, 64, stages=4),
    Tile(256, 128, 64, stages=3, flatten=True),
    Tile(128, 128, 64, warps=4, stages=3),
    Tile(128, 128, 64, stages=4, flatten=True),
    Tile(128, 128, 128, stages=3),
    Tile(64, 256, 64, warps=4, stages=3),
)
#: Kernels whose tile is stored, too, which takes shared memory in addition to the stages.
_DENSE = (
    Tile(128, 256, 64, stages=3, flatten=True),
    Tile(128, 256, 64, stages=3),
    Tile(128, 256, 32, stages=4, flatten=True),
    Tile(256, 128, 64, stages=3),
    Tile(256, 128, 64, stages=3, flatten=True),
    Tile(128, 128, 64, warps=4, stages=3),
    Tile(128, 128, 64, stages=4, flatten=True),
    Tile(128, 128, 128, stages=3),
    Tile(64, 256, 64, warps=4, stages=3),
)
_SPARSE = (
    Tile(128, 256, 64, stages=4),
    Tile(128, 256, 64, stages=3),
    Tile(128, 128, 64, stages=4),
    Tile(128, 128, 64, warps=4, stages=3),
    Tile(128, 128, 128, stages=3),
)
_PRODUCTS = (
    Tile(128, 256, 64, stages=3),
    Tile(128, 256, 64, stages=4),
    Tile(128, 256, 64, stages=5),
    Tile(128, 256, 64, stages=7),
    Tile(128, 256, 32, stages=6),
    Tile(128, 128, 64, stages=4),
    Tile(128, 128, 64, stages=6),
)
#: Tiles for an architecture without tensor maps, whose operands pass through registers.
_LOGITS_80 = (
    Tile(128, 128, 32, stages=3),
    Tile(128, 128, 32, stages=4),
    Tile(128, 128, 32, warps=4, stages=3),
    Tile(128, 128, 64, stages=3),
    Tile(128, 256, 32, stages=3),
    Tile(256, 128, 32, stages=3),
    Tile(128, 64, 64, warps=4, stages=3),
    Tile(64, 128, 64, warps=4, stages=3),
)
_PRODUCTS_80 = (
    Tile(128, 128, 32, stages=3),
    Tile(128, 128, 32, stages=4),
    Tile(128, 128, 32, stages=5),
    Tile(128, 128, 64, stages=3),
    Tile(128, 256, 32, stages=3),
    Tile(128, 64, 64, stages=3),
)
_TF32 = (
    Tile(128, 128, 32, stages=3),
    Tile(128, 128, 32, stages=4),
    Tile(128, 128, 32, warps=4, stages=3),
    Tile(128, 128, 16, stages=4),
    Tile(128, 64, 32, warps=4, stages=3),
    Tile(64, 128, 32, warps=4, stages=3),
)
_FMA = (
    Tile(32, 64, 32, warps=4, stages=2),
    Tile(64, 64, 32, warps=4, stages=2),
    Tile(64, 64, 16, warps=4, stages=3),
    Tile(64, 128, 16, warps=8, stages=2),
    Tile(32, 128, 16, warps=4, stages=2),
    Tile(32, 32, 32, warps=4, stages=2),
)


def kernels_of(problem: Problem, spec: Spec) -> tuple[str, ...]:
    """Names of the tiles that a call of this problem uses, in tuning order."""
    if not problem.needs_grad:
        return ("forward",)
    if spec.filter == "none":
        return ("forward", "dense")
    products = [name for name, wanted in (("de", problem.grad_e), ("dc", problem.grad_c)) if wanted]
    return ("forward", "sparse", *products)


def candidates(kernel: str, launch: Launch, problem: Problem, spec: Spec, device: Device) -> tuple[Tile, ...]:
    """Tiles to try in place of that of ``launch``, adjusted to the problem and without repeats."""
    own = getattr(launch, kernel)
    found = dict.fromkeys(
        getattr(fitted(launch.with_tiles({kernel: tile}), problem, spec), kernel)
        for tile in _table(kernel, problem, device)
    )
    return tuple(tile for tile in found if tile != own)


def _table(kernel: str, problem: Problem, device: Device) -> tuple[Tile, ...]:
    product = kernel in ("de", "dc")
    if problem.dtype == torch.float32:
        return _FMA if device.precision == "ieee" else _TF32
    if device.capability < (9, 0):
        return _PRODUCTS_80 if product else _LOGITS_80
    return {"forward": _FORWARD, "dense": _DENSE, "sparse": _SPARSE}.get(kernel, _PRODUCTS)
