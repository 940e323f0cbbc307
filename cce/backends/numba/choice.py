"""Choice of the tiles of a problem's kernels, which changes their speed and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from cce.backends.numba.tile import Tile
from cce.backends.problem import Problem
from cce.spec import Spec

#: Kinds of arithmetic by dtype; float32 has two.
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class GPU:
    """Properties of a GPU on which the choice depends; no multiprocessors stand for the simulator."""

    capability: tuple[int, int]
    programs: int

    @property
    def hopper(self) -> bool:
        """Whether the compute capability is 9.0, the only one with the instructions of ``wgmma.py``."""
        return self.capability[0] == 9

    @property
    def simulated(self) -> bool:
        return self.programs == 0


SIMULATOR = GPU((8, 0), 0)


@dataclass(frozen=True)
class Choice:
    """Tiles of the forward, of dx of a chunk, of dx of live tiles, and of their products with c and with e.

    Attributes:
        pack: number of vocabulary blocks side by side in a tile of ``live``.
        programs: number of thread blocks that run at the same time.
    """

    forward: Tile
    gradient: Tile
    live: Tile
    de: Tile
    dc: Tile
    pack: int
    programs: int


def gpu_of(device: str) -> GPU:
    """The current GPU, or the simulator for CPU tensors."""
    return SIMULATOR if device == "cpu" else _gpu(torch.cuda.current_device())


@lru_cache
def _gpu(index: int) -> GPU:
    found = torch.cuda.get_device_properties(index)
    return GPU((found.major, found.minor), found.multi_processor_count)


def choose(problem: Problem, spec: Spec, gpu: GPU, ieee: bool) -> Choice:
    """Choose the tiles for a resolved spec."""
    kind = KINDS.get(problem.dtype) or ("ieee" if ieee else "tf32")
    filtered = spec.filter != "none"
    block_n, block_v = (spec.block_n or 16, spec.block_v or 16) if filtered else (128, 128)
    widest = block_v if problem.maps(spec) else 16
    both = "entropy" in problem.outputs or problem.bias
    forward = both or "prediction" in problem.outputs or (kind == "ieee" and problem.softcap is not None)
    gradient = both or "weighted_logit" in problem.outputs or problem.softcap is not None or problem.k > 1
    return _choose(kind, widest, block_n, block_v, forward, gradient, gpu)


@lru_cache
def _choose(
    kind: str, widest: int, block_n: int, block_v: int, busy_forward: bool, busy_gradient: bool, gpu: GPU
) -> Choice:
    if gpu.simulated:
        small = Tile(kind, 1, 1, max(32, widest), 3)
        pack = max(1, 32 // block_v)
        de, dc = (_rows(kind, rows, 32, 3) for rows in (block_n, min(block_v, 128)))
        return Choice(small, small, _rows(kind, block_n, pack * block_v, 3), de, dc, pack, 2)
    hopper = gpu.hopper and kind != "ieee"
    stages = 3 if gpu.capability[0] >= 9 else 2  # two thread blocks share 164 KiB of memory on sm_80
    if hopper:
        wide = Tile(kind, 8, 1, 256, 4, hopper=True)
    else:
        wide = Tile(kind, 8, 1, 256, 2) if widest == 256 else Tile(kind, 4, 2, 128, stages, resident=2)
    # Fewer columns for epilogues that need registers.
    many = Tile(kind, 8, 1, 128, 6, hopper=True) if hopper else wide
    if kind == "ieee" and widest <= 64:
        many = Tile(kind, 4, 2, 64, stages, resident=2)
    forward, gradient = (many if busy and widest <= 128 else wide for busy in (busy_forward, busy_gradient))
    live = gradient if block_n == 128 and block_v <= gradient.columns else _rows(kind, block_n, max(block_v, 64), 2, 64)
    transposed = hopper and kind != "tf32"  # its matrix unit can read such factors
    de, dc = (
        Tile(kind, 8, 1, 256, 4, hopper=True) if transposed and rows == 128 else _rows(kind, rows, 128, stages)
        for rows in (block_n, min(block_v, 128))
    )
    return Choice(forward, gradient, live, de, dc, max(1, live.columns // block_v), gpu.programs * wide.resident)


def _rows(kind: str, rows: int, columns: int, stages: int, most: int = 128) -> Tile:
    """Tile of so many rows: 32 per warp if there are that many, and registers for them (``most`` columns)."""
    parts = 2 if rows >= 32 and columns <= min(most, 2 * rows) else 1
    warps = rows // (16 * parts)
    return Tile(kind, warps, parts, columns, stages, resident=2 if warps <= 4 and columns <= 128 else 1)
