"""Launch configurations: settings that change the speed of the kernels and nothing else.

One frozen dataclass, and one factory that owns the heuristics. The figures for sm_90 were measured
(docs/performance-notes.md); those for other architectures compile but were never timed. Tiles are smaller where they
would spill many registers; tests/triton/spills.py lists those that still do. ``choice.py`` replaces them by
configurations the user has tuned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from cce.backends.gpu.sizes import ALIGNMENT, BLOCKS_V, LEAST_COLUMNS
from cce.backends.problem import Problem
from cce.spec import Spec

#: The fields of :class:`Launch` that are tiles.
TILES = ("forward", "dense", "sparse", "de", "dc")


@dataclass(frozen=True)
class Device:
    """Properties of a GPU on which a configuration depends.

    Attributes:
        name: name of the model.
        capability: compute capability.
        programs: number of multiprocessors.
        precision: precision of float32 products, "ieee" or "tf32"; without meaning for 16-bit ones.
    """

    name: str
    capability: tuple[int, int]
    programs: int
    precision: str


@dataclass(frozen=True)
class Tile:
    """Output tile of a matrix product, and the way it is computed.

    Attributes:
        rows, columns: size of the output tile.
        depth: depth of one step of the product.
        warps, stages: warps of the program, stages of its software pipeline.
        flatten: whether one pipeline runs through all of a program's tiles, so that stores overlap the next tile's
            loads.

    Raises:
        TypeError, ValueError: no kernel can be made with a field's value, which may have come from a file.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 8
    stages: int = 4
    flatten: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (("rows", 16, 256), ("columns", 16, 256), ("depth", 16, 256), ("warps", 1, 16)):
            value = _int(name, getattr(self, name))
            if not least <= value <= most or value & (value - 1):
                raise ValueError(f"Tile.{name}: got {value}, expected a power of two in [{least}, {most}]")
        if not 1 <= _int("stages", self.stages) <= 10:
            raise ValueError(f"Tile.stages: got {self.stages}, expected an int in [1, 10]")
        if not isinstance(self.flatten, bool):
            raise TypeError(f"Tile.flatten: got {self.flatten!r}, expected True or False")

    def __str__(self) -> str:
        flat = ", flat" if self.flatten else ""
        return f"{self.rows} x {self.columns} x {self.depth}, {self.warps} warps, {self.stages} stages{flat}"


def _int(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Tile.{name}: got {value!r} of type {type(value).__name__}, expected an int")
    return value


@dataclass(frozen=True)
class Launch:
    """Configuration of every kernel for one problem.

    Attributes:
        forward, dense, sparse: tiles of logits, BLOCK_N x TILE_V, depth along D.
        de, dc: tiles of the block-sparse products; the depth of ``de`` runs along the vocabulary, of ``dc`` along rows.
        group_n: row blocks that run side by side and share what they read of ``c``.
        tma: whether the architecture has tensor-map loads.
        programs: programs of a persistent grid, one per multiprocessor.
        measured: whether the figures come from a measurement on this architecture.
        tuned: whether they come from a measurement of this problem on this GPU.
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
    tuned: bool = False

    def with_tiles(self, tiles: Mapping[str, Tile]) -> Launch:
        """Return this configuration with some tiles, given by name, replaced."""
        changes: dict[str, Any] = {**tiles}
        return replace(self, **changes)

    def tiles(self, names: Iterable[str]) -> dict[str, Tile]:
        """Tiles with these names."""
        return {name: getattr(self, name) for name in names}


#: Tiles by architecture for 16-bit operands; the products' tiles are always BLOCK_N (BLOCK_V) high, despite these rows.
_SM90 = Launch(
    forward=Tile(128, 256, 64, stages=4, flatten=True),
    dense=Tile(128, 256, 64, stages=3, flatten=True),
    sparse=Tile(128, 256, 64, stages=3),
    de=Tile(128, 256, 64, stages=5),
    dc=Tile(128, 256, 64, stages=5),
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
    de=Tile(128, 128, 64, stages=3),
    dc=Tile(128, 128, 64, stages=3),
    measured=False,
)
_SM80 = Launch(
    forward=Tile(128, 128, 32, stages=3),
    dense=Tile(128, 128, 32, stages=3),
    sparse=Tile(128, 128, 32, stages=3),
    de=Tile(128, 64, 32, stages=3),
    dc=Tile(128, 128, 32, stages=3),
    group_n=16,
    tma=False,
    programs=108,
    measured=False,
)
#: IEEE float32 has no matrix unit, so tiles of multiply-adds are small, unless the filter's blocks need a larger one.
_FMA = Tile(32, 64, 32, warps=4, stages=2)
_FMA_BLOCKS = Tile(32, 64, 32, warps=8, stages=2)
#: Tiles that need fewer registers: where operands are loaded by pointers and masks, which take a register or two each,
#: and where an epilogue has many options.
_ODD = {
    "forward": Tile(128, 128, 32),
    "dense": Tile(128, 128, 64),
    "sparse": Tile(128, 128, 64),
    "de": Tile(128, 64, 64, stages=3),
    "dc": Tile(128, 64, 64, stages=3),
}
_ODD_80 = {
    "forward": Tile(128, 128, 32, stages=3),
    "dense": Tile(128, 64, 32, stages=3),
    "sparse": Tile(128, 128, 32, stages=3),
    "de": Tile(128, 64, 32, stages=3),
    "dc": Tile(128, 64, 32, stages=3),
}
_NARROW = {90: Tile(128, 128, 64), 80: Tile(128, 64, 32, stages=3)}


def shipped(problem: Problem, spec: Spec, device: Device) -> Launch:
    """Shipped configuration for a problem on a device; ``spec`` is resolved."""
    base = _SM100 if device.capability >= (10, 0) else _SM90 if device.capability >= (9, 0) else _SM80
    wide = problem.dtype == torch.float32
    if wide and device.precision == "ieee":
        own = _FMA_BLOCKS
        base = replace(base, forward=_FMA, dense=_FMA, sparse=own, de=own, dc=own, tma=False, measured=False)
    elif wide:
        base = _halved(base)
    else:
        base = base.with_tiles(_spared(problem, device.capability))
    assert spec.block_n is not None
    # Few row blocks give few tiles of dE: narrower tiles then keep more multiprocessors busy.
    blocks = -(-problem.n // min(spec.block_n, base.sparse.rows))
    if blocks * -(-problem.d // base.de.columns) < 2 * device.programs:
        base = replace(base, de=replace(base.de, columns=min(base.de.columns, 128)))
    return fitted(replace(base, programs=device.programs), problem, spec)


def _spared(problem: Problem, capability: tuple[int, int]) -> dict[str, Tile]:
    """Tiles of 16-bit operands, by name, that replace the usual ones where those would spill registers."""
    tma = capability >= (9, 0)
    if problem.d * problem.dtype.itemsize % ALIGNMENT:
        return _ODD if tma else _ODD_80
    narrow = _NARROW[90 if tma else 80]
    entropy = "entropy" in problem.outputs
    capped = problem.softcap is not None
    found = {"dense": narrow} if entropy or (capped and capability >= (10, 0)) else {}
    if entropy and (capped or len(problem.outputs) > 1):
        found["forward"] = found["sparse"] = narrow
    return found


def fitted(launch: Launch, problem: Problem, spec: Spec) -> Launch:
    """Configuration nearest to ``launch`` that can compute ``problem`` under a resolved ``spec``.

    It takes the filter's blocks from the spec, fits a chunk of the least width into the scratch memory, and leaves out
    settings that no kernel supports.
    """
    # A second target per row takes a loop in the epilogue, which one pipeline through all tiles cannot contain; nor
    # does it have registers for a softcap or an entropy.
    plain = problem.k == 1 and problem.softcap is None and "entropy" not in problem.outputs
    dense = replace(
        launch.dense, columns=min(launch.dense.columns, LEAST_COLUMNS), flatten=launch.dense.flatten and plain
    )
    launch = replace(launch, dense=dense)
    if spec.filter == "none":
        return launch
    forward, sparse, de, dc = launch.forward, launch.sparse, launch.de, launch.dc
    assert spec.block_n is not None and spec.block_v is not None
    if problem.maps(spec):
        forward = replace(forward, columns=max(spec.block_v, forward.columns))
    # The widest block needs twice the shared memory of two narrower ones for its store, as much as a stage.
    stages = min(sparse.stages, 3) if spec.block_v == BLOCKS_V[-1] else sparse.stages
    return replace(
        launch,
        forward=forward,
        # Never one pipeline through all items: on an H100, the kernel Triton 3.6 made of it gave a different dE.
        sparse=replace(
            sparse, rows=spec.block_n, columns=max(spec.block_v, sparse.columns), stages=stages, flatten=False
        ),
        # One kernel computes both products: it is launched with the warps of dc.
        de=replace(de, rows=spec.block_n, depth=min(de.depth, spec.block_v), warps=dc.warps),
        dc=replace(dc, rows=min(dc.rows, spec.block_v), depth=min(dc.depth, spec.block_n)),
    )


def _halved(base: Launch) -> Launch:
    """Tiles for operands of twice the size: half as deep, and narrower where registers hold converted operands."""

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
