"""Launch configurations: what changes the speed of the kernels and nothing else.

One frozen dataclass, and one factory that owns the heuristics. The figures for sm_90 were measured
(docs/performance-notes.md); those of the other architectures compile without spills and were never timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from cce.problem import Problem
from cce.spec import Spec


@dataclass(frozen=True)
class Tile:
    """One matrix product's output tile, and how it is computed.

    Attributes:
        rows, columns: of the output tile.
        depth: of one step of the product.
        warps, stages: of the program; stages of its software pipeline.
        flatten: one pipeline through all of a program's tiles, so that stores overlap with the next tile's loads.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 8
    stages: int = 4
    flatten: bool = False


@dataclass(frozen=True)
class Launch:
    """Every kernel's configuration for one problem.

    Attributes:
        forward, dense, sparse: tiles of logits, BLOCK_N x TILE_V, depth along D.
        de, dc: tiles of the block-sparse products; the depth of ``de`` runs along the vocabulary, of ``dc`` along rows.
        group_n: row blocks that run side by side and share what they read of ``c``.
        tma: the architecture has tensor-map loads.
        programs: of a persistent grid: one a multiprocessor.
        measured: the figures come from a measurement on this architecture.
    """

    forward: Tile
    dense: Tile
    sparse: Tile
    de: Tile
    dc: Tile
    group_n: int
    tma: bool
    programs: int
    measured: bool


#: Tiles by architecture for 16-bit operands; the products' tiles are BLOCK_N (BLOCK_V) high whatever is said here.
_SM90 = Launch(
    forward=Tile(128, 256, 64, stages=4, flatten=True),
    dense=Tile(128, 256, 64, stages=3, flatten=True),
    sparse=Tile(128, 256, 64, stages=4),
    de=Tile(128, 256, 64, stages=5),
    dc=Tile(128, 256, 64, stages=7),
    group_n=16,
    tma=True,
    programs=132,
    measured=True,
)
_SM100 = replace(
    _SM90,
    forward=Tile(128, 256, 64, stages=3),
    dense=Tile(128, 256, 64, stages=3),
    sparse=Tile(128, 256, 64, stages=3),
    de=Tile(128, 256, 64, stages=3),
    dc=Tile(128, 256, 64, stages=3),
    measured=False,
)
_SM80 = Launch(
    forward=Tile(128, 128, 32, stages=3),
    dense=Tile(128, 128, 32, stages=3),
    sparse=Tile(128, 128, 32, stages=3),
    de=Tile(128, 128, 32, stages=3),
    dc=Tile(128, 128, 32, stages=3),
    group_n=16,
    tma=False,
    programs=108,
    measured=False,
)
#: IEEE float32 has no matrix unit: small tiles of multiply-adds.
_FMA = Tile(32, 64, 32, warps=4, stages=2)


@lru_cache(maxsize=256)
def choose(problem: Problem, spec: Spec, capability: tuple[int, int], programs: int, precision: str) -> Launch:
    """The configuration for a problem on a device.

    Args:
        problem, spec: of the call; ``spec`` is resolved.
        capability: compute capability.
        programs: number of multiprocessors.
        precision: of float32 products, "ieee" or "tf32"; has no meaning for 16-bit ones.
    """
    base = _SM100 if capability >= (10, 0) else _SM90 if capability >= (9, 0) else _SM80
    wide = problem.dtype == torch.float32
    if wide and precision == "ieee":
        base = replace(base, forward=_FMA, dense=_FMA, sparse=_FMA, de=_FMA, dc=_FMA, tma=False, measured=False)
    elif wide:
        base = _halved(base)
    assert spec.block_n is not None and spec.block_v is not None
    block_n = min(spec.block_n, base.sparse.rows)
    sparse = replace(base.sparse, rows=spec.block_n, columns=max(spec.block_v, base.sparse.columns))
    forward = base.forward
    if problem.maps(spec):
        forward = replace(forward, columns=max(spec.block_v, forward.columns))
    # Few row blocks make few tiles of dE: narrower ones then keep more multiprocessors busy.
    de_columns = base.de.columns
    if -(-problem.n // block_n) * -(-problem.d // de_columns) < 2 * programs:
        de_columns = min(de_columns, 128)
    # A second target a row takes a loop in the epilogue, which one pipeline through all tiles cannot hold; nor has it
    # registers for a softcap or an entropy.
    plain = problem.k == 1 and problem.softcap is None and "entropy" not in problem.outputs
    flat = plain and block_n == base.sparse.rows
    return replace(
        base,
        programs=programs,
        forward=forward,
        dense=replace(base.dense, flatten=base.dense.flatten and plain),
        sparse=replace(sparse, flatten=sparse.flatten and flat),
        de=replace(base.de, rows=spec.block_n, columns=de_columns, depth=min(base.de.depth, spec.block_v)),
        dc=replace(base.dc, rows=min(base.dc.rows, spec.block_v), depth=min(base.dc.depth, spec.block_n)),
    )


def _halved(base: Launch) -> Launch:
    """For operands of twice the size: half the depth, and fewer columns where registers hold converted operands."""

    def half(tile: Tile) -> Tile:
        return replace(tile, columns=min(tile.columns, 128), depth=32, stages=3, flatten=False)

    return replace(
        base,
        forward=half(base.forward),
        dense=half(base.dense),
        sparse=half(base.sparse),
        de=half(base.de),
        dc=half(base.dc),
        measured=False,
    )
