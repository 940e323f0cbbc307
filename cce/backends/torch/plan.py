"""How large a piece of the logits is worked on at a time: as much as the scratch budget and the caches like."""

from __future__ import annotations

from dataclasses import dataclass

from cce.backends.torch.arithmetic import Arithmetic
from cce.problem import Problem
from cce.spec import Spec

# Rows and columns of logits, by device type. On a CPU 1024 x 512 float32 logits (2 MB) stay near the
# cores between the product and the softmax; measured best of 128..1024 x 256..4096 (performance notes).
_PREFERRED = {"cpu": (1024, 512)}
_PREFERRED_GPU = (8192, 4096)


@dataclass(frozen=True)
class Plan:
    """Rows and columns of a piece of the logits; ``columns`` is a multiple of BLOCK_V."""

    rows: int
    columns: int

    @classmethod
    def choose(cls, problem: Problem, spec: Spec) -> Plan:
        """The largest piece up to the preferred one whose temporaries fit into ``spec.scratch_bytes``."""
        assert spec.block_v is not None
        rows, columns = _PREFERRED.get(problem.device, _PREFERRED_GPU)
        rows = min(rows, problem.n)
        tiles = max(1, min(columns, problem.v + spec.block_v - 1) // spec.block_v)
        while _scratch(problem, spec, rows, tiles * spec.block_v) > spec.scratch_bytes and (rows > 1 or tiles > 1):
            if tiles * spec.block_v >= rows and tiles > 1:
                tiles = (tiles + 1) // 2
            elif rows > 1:
                rows = (rows + 1) // 2
            else:
                tiles = (tiles + 1) // 2
        return cls(rows, tiles * spec.block_v)

    def row_blocks(self, n: int) -> list[tuple[int, int]]:
        return [(n0, min(n, n0 + self.rows)) for n0 in range(0, n, self.rows)]


def minimum_scratch(problem: Problem, spec: Spec) -> int:
    """Bytes below which not even one row of one tile can be worked on."""
    assert spec.block_v is not None
    return _scratch(problem, spec, 1, spec.block_v)


def fits_whole(problem: Problem, spec: Spec, arithmetic: Arithmetic) -> bool:
    """Whether a copy of all rows of ``e`` may be kept beside the piece, a quarter of the budget at most."""
    return 4 * problem.n * problem.d * arithmetic.operand.itemsize <= spec.scratch_bytes


def _scratch(problem: Problem, spec: Spec, rows: int, columns: int) -> int:
    arithmetic = Arithmetic.choose(problem, spec)
    wide, narrow = arithmetic.result.itemsize, arithmetic.operand.itemsize
    tiles = spec.tiles(problem.v)
    logits = rows * columns * _logit_buffers(problem, arithmetic)
    operands = (2 * rows + columns) * problem.d * narrow  # rows of e, kept and gathered; a chunk of c
    sums = (rows + columns) * problem.d * wide  # dE of gathered rows, dC of a chunk
    tile_sums = 3 * rows * tiles * wide if spec.lse_accumulation == "tile" else 0
    return logits + operands + sums + tile_sums


def _logit_buffers(problem: Problem, arithmetic: Arithmetic) -> int:
    """Bytes a logit takes: itself, a second array where its formula needs z and p, its copy in the products' dtype."""
    arrays = 2 if "entropy" in problem.outputs or problem.softcap is not None else 1
    copy = arithmetic.operand.itemsize if arithmetic.operand != arithmetic.result else 0
    return arrays * arithmetic.result.itemsize + copy
