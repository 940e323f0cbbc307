"""What each kernel is compiled for; known without Numba."""

from __future__ import annotations

from dataclasses import dataclass

from cce.backends.numba.tile import PANEL, PIECE, Tile


@dataclass(frozen=True)
class Statistics:
    """What a forward kernel is compiled for."""

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
    """What a kernel for dx is compiled for; ``ordered``, ``sorted`` and the blocks belong to live tiles."""

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
        """Where in shared memory the biases of a tile are: behind the panels, and a sum of each warp and column."""
        tile = self.tile
        return tile.stages * tile.stage_bytes + (4 * tile.warps * tile.columns if self.sums else 0)

    @property
    def weights(self) -> int:
        """Where the weights of its columns are, which make a difference to dx with a softcap only."""
        return self.biases + (4 * self.tile.columns if self.bias else 0)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.weights + (4 * self.tile.columns if self.weighted and self.softcap else 0)


@dataclass(frozen=True)
class Product:
    """What dE, dC or dbias of live tiles is compiled for.

    Attributes:
        out: arithmetic whose dtype dC is written in.
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
        """Bytes of a step's panels: of dx as it lies, and of rows of c or e."""
        tile = self.tile
        return PANEL * (tile.rows + tile.depth * tile.panels(tile.columns))

    @property
    def stage_transposed(self) -> int:
        """Likewise, with dx transposed."""
        tile = self.tile
        return PANEL * tile.depth * (tile.panels(tile.rows) + tile.panels(tile.columns))


@dataclass(frozen=True)
class Sums:
    """What a kernel for dE and dC is compiled for: both, if their tiles have as many threads; None for the other."""

    de: Product | None
    dc: Product | None

    @property
    def tile(self) -> Tile:
        """Of one of them."""
        product = self.de or self.dc
        assert product is not None
        return product.tile

    @property
    def panels(self) -> int:
        """Bytes of shared memory before the number of the tile that was drawn."""
        de = 0 if self.de is None else self.de.tile.stages * self.de.stage
        return max(de, 0 if self.dc is None else self.dc.tile.stages * self.dc.stage_transposed)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.panels + PIECE

    @property
    def resident(self) -> int:
        """Blocks of threads on a multiprocessor."""
        return min(product.tile.resident for product in (self.de, self.dc) if product is not None)


@dataclass(frozen=True)
class Targets:
    """What the kernel is compiled for: kinds of numbers are those of ``Tile``."""

    e: str
    c: str
    bias: bool = False
    scale: bool = False
    softcap: bool = False
    warps: int = 4


@dataclass(frozen=True)
class Means:
    """What the kernel for mean rows of ``c`` is compiled for."""

    kind: str
    block_v: int
    ordered: bool = False


@dataclass(frozen=True)
class Mass:
    """What the kernel for the mass of dead tiles is compiled for.

    Attributes:
        out: arithmetic whose dtype it is written in. half: the maps are float16.
    """

    out: str
    block_n: int
    block_v: int
    half: bool = False
    entropy: bool = False
    softcap: bool = False
