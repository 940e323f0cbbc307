"""Shape of a tile of logits and of the threads that compute it, for which a kernel is compiled."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of a row of a panel, and of a piece of it, the unit of a copy.
PANEL, PIECE = 128, 16
PIECES = PANEL // PIECE


@dataclass(frozen=True)
class Tile:
    """A tile of a matrix product.

    Its factors are read in panels: 128 bytes of each row, ``depth`` elements. A warp owns whole rows of the tile, 16
    for each of its ``parts``. Of these a thread has rows ``first_row + 8 r`` for r < 2 parts, and in each the columns
    ``first_column + 8 (k // 2) + k % 2`` for k < columns / 4; first_row is 16 parts warp + lane // 4 and first_column 2
    (lane % 4). Matrix instructions of all architectures spread a result over a warp in this way.

    Attributes:
        kind: kind of arithmetic: "bf16", "fp16", "tf32" or "ieee".
        warps, parts, columns: as above. stages: number of panels of each factor in shared memory.
        hopper: whether products use Hopper's matrix unit.
        resident: number of thread blocks on a multiprocessor at a time.
    """

    kind: str
    warps: int
    parts: int
    columns: int
    stages: int
    hopper: bool = False
    resident: int = 1

    @property
    def rows(self) -> int:
        return 16 * self.parts * self.warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def itemsize(self) -> int:
        return 2 if self.kind in ("bf16", "fp16") else 4

    @property
    def depth(self) -> int:
        """Number of elements in a row of a panel."""
        return PANEL // self.itemsize

    @property
    def ahead(self) -> int:
        """Number of panels in flight while one is multiplied. Hopper's unit may still read the previous one."""
        return self.stages - (2 if self.hopper else 1)

    @property
    def stage_bytes(self) -> int:
        """Bytes of a panel of each factor."""
        return PANEL * (self.rows + self.columns)

    @property
    def thread_rows(self) -> int:
        return 2 * self.parts

    @property
    def thread_columns(self) -> int:
        return self.columns // 4

    def panels(self, columns: int) -> int:
        """Number of panels that so many columns of a matrix take."""
        return -(-columns // self.depth)
