"""Options each kernel is compiled for, known without importing Numba."""

from __future__ import annotations

from dataclasses import dataclass

from cce.backends.numba.tile import PANEL, PIECE, Tile


@dataclass(frozen=True)
class Statistics:
    """Options of a forward kernel."""

    tile: Tile
    bias: bool = False
    scale: bool = False
    softcap: bool = False
    online: bool = False
    entropy: bool = False
    weighted: bool = False
    prediction: bool = False
    maps: bool = False
    tile_entropy: bool = False
    block_v: int = 0
    group: int = 16


@dataclass(frozen=True)
class Gradient:
    """Options of a kernel for dx; ``ordered``, ``sorted`` and the blocks are for live tiles."""

    tile: Tile
    bias: bool = False
    scale: bool = False
    softcap: bool = False
    entropy: bool = False
    weighted: bool = False
    sums: bool = False
    one_target: bool = True
    ordered: bool = False
    sorted: bool = False
    block_n: int = 0
    block_v: int = 0
    group: int = 8

    @property
    def biases(self) -> int:
        """Offset of a tile's biases in shared memory: after the panels, and a sum for each warp and column."""
        tile = self.tile
        return tile.stages * tile.stage_bytes + (4 * tile.warps * tile.columns if self.sums else 0)

    @property
    def weights(self) -> int:
        """Offset of the weights of a tile's columns, which affect dx with a softcap only."""
        return self.biases + (4 * self.tile.columns if self.bias else 0)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.weights + (4 * self.tile.columns if self.weighted and self.softcap else 0)


@dataclass(frozen=True)
class Product:
    """Options of dE, dC or dbias of live tiles.

    Attributes:
        out: kind of arithmetic whose dtype dC is written in.
    """

    tile: Tile
    block_n: int
    block_v: int
    out: str = ""
    ordered: bool = False
    sorted: bool = False
    compensate: bool = False
    norm: bool = False

    @property
    def stage(self) -> int:
        """Bytes of a step's panels: those of dx as stored, and those of rows of c or e."""
        tile = self.tile
        return PANEL * (tile.rows + tile.depth * tile.panels(tile.columns))

    @property
    def stage_transposed(self) -> int:
        """Bytes of a step's panels with dx transposed."""
        tile = self.tile
        return PANEL * tile.depth * (tile.panels(tile.rows) + tile.panels(tile.columns))


@dataclass(frozen=True)
class Sums:
    """Options of a kernel for dE and dC: of both if their tiles have equally many threads, else None for one."""

    de: Product | None
    dc: Product | None

    @property
    def tile(self) -> Tile:
        """Tile of one of the products."""
        product = self.de or self.dc
        assert product is not None
        return product.tile

    @property
    def panels(self) -> int:
        """Offset in shared memory of the drawn tile's number, after the panels."""
        de = 0 if self.de is None else self.de.tile.stages * self.de.stage
        return max(de, 0 if self.dc is None else self.dc.tile.stages * self.dc.stage_transposed)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.panels + PIECE

    @property
    def resident(self) -> int:
        """Number of thread blocks on a multiprocessor."""
        return min(product.tile.resident for product in (self.de, self.dc) if product is not None)


@dataclass(frozen=True)
class Targets:
    """Options of the kernel for targets' logits; kinds of arithmetic are those of ``Tile``."""

    e: str
    c: str
    bias: bool = False
    scale: bool = False
    softcap: bool = False
    warps: int = 4


@dataclass(frozen=True)
class Means:
    """Options of the kernel for mean rows of ``c``."""

    kind: str
    block_v: int
    ordered: bool = False


@dataclass(frozen=True)
class Mass:
    """Options of the kernel for the mass of dead tiles.

    Attributes:
        out: kind of arithmetic whose dtype it is written in. half: whether the maps are float16.
    """

    out: str
    block_n: int
    block_v: int
    half: bool = False
    entropy: bool = False
    softcap: bool = False
