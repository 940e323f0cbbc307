"""Size of the piece of the logits computed at a time, from the scratch budget and the sizes of caches."""

from __future__ import annotations

from dataclasses import dataclass

from cce.backends.problem import Problem
from cce.backends.torch.arithmetic import Arithmetic
from cce.spec import Spec

# Rows and columns of logits, by device type. On a CPU 1024 x 1024 float32 logits (4 MB) stay in cache between the
# product and the softmax; 512 to 4096 columns differ by less than the noise (performance notes).
_PREFERRED = {"cpu": (1024, 1024)}
# On a GPU a piece has to fill the chip, and each costs a dozen launches.
_PREFERRED_GPU = (8192, 4096)


# Largest number of skipped tiles compensated at once.
_TILES = 64


@dataclass(frozen=True)
class Plan:
    """Rows and columns of a piece of the logits; ``columns`` is a multiple of BLOCK_V.

    Attributes:
        keep_rows: whether a copy of all rows of ``e``, gathered and in the products' dtype, is made once and kept.
        tiles: number of skipped tiles compensated at once, in an eighth of the budget.
    """

    rows: int
    columns: int
    keep_rows: bool
    tiles: int

    @classmethod
    def choose(cls, problem: Problem, spec: Spec, gathered: bool) -> Plan:
        """Choose the largest piece, up to the preferred one, whose temporaries fit into ``spec.scratch_bytes``.

        ``gathered``: whether rows of ``e`` are left out, or the vocabulary has its own order.
        """
        assert spec.block_v is not None
        kept = problem.n * problem.d * Arithmetic.choose(problem, spec).operand.itemsize
        keep = 4 * kept <= spec.scratch_bytes  # at most a quarter of the budget
        budget = spec.scratch_bytes - (kept if keep else 0)
        group = 0
        if spec.filter != "none" and spec.compensate:
            budget -= spec.scratch_bytes // 8
            # A tile takes some vectors of N, its mean row of c and its product with e.
            one = (6 * problem.n + 4 * problem.d) * Arithmetic.choose(problem, spec).result.itemsize
            group = max(1, min(_TILES, spec.scratch_bytes // 8 // one))
        rows, columns = _PREFERRED.get(problem.device, _PREFERRED_GPU)
        rows = min(rows, problem.n)
        tiles = max(1, min(columns, problem.v + spec.block_v - 1) // spec.block_v)
        while _scratch(problem, spec, rows, tiles * spec.block_v, gathered) > budget and (rows > 1 or tiles > 1):
            if tiles > 1 and (tiles * spec.block_v >= rows or rows == 1):
                tiles = (tiles + 1) // 2
            else:
                rows = (rows + 1) // 2
        return cls(rows, tiles * spec.block_v, keep, group)

    def row_blocks(self, n: int) -> list[tuple[int, int]]:
        """Bounds of every block of rows, among ``n`` rows."""
        return [(n0, min(n, n0 + self.rows)) for n0 in range(0, n, self.rows)]


def minimum_scratch(problem: Problem, spec: Spec) -> int:
    """Bytes needed for one row of one tile."""
    assert spec.block_v is not None
    # A kept copy of the rows takes up to a quarter of the budget, and the compensation an eighth.
    return 2 * _scratch(problem, spec, 1, spec.block_v, gathered=True)


def _scratch(problem: Problem, spec: Spec, rows: int, columns: int, gathered: bool) -> int:
    """Bytes of all temporaries of one piece."""
    arithmetic = Arithmetic.choose(problem, spec)
    wide, narrow = arithmetic.result.itemsize, arithmetic.operand.itemsize
    filtered = spec.filter != "none"
    sparse = gathered or filtered
    # Gathering copies an operand once, and widening copies it again.
    e_copies = sparse + (problem.e_dtype != arithmetic.operand)
    c_copies = gathered + (problem.c_dtype != arithmetic.operand)
    operands = (rows * e_copies + columns * c_copies) * problem.d * narrow
    slab = columns * problem.d * wide if gathered or problem.c_dtype != arithmetic.result else 0
    gathered_de = 2 * rows * problem.d * wide if filtered else 0
    vectors = 24 * rows * (problem.k + 1) * 8 + 4 * columns * wide
    tiles = 3 * rows * spec.tiles(problem.v) * wide if problem.maps(spec) else 0  # kept until the row's lse is known
    return rows * columns * _logit_buffers(problem, arithmetic) + operands + slab + gathered_de + vectors + tiles


def _logit_buffers(problem: Problem, arithmetic: Arithmetic) -> int:
    """Bytes per logit: itself, a second array where the formula needs z and p, its copy in the products' dtype."""
    arrays = 1 + ("entropy" in problem.outputs) + (problem.softcap is not None)
    copy = arithmetic.operand.itemsize if arithmetic.operand != arithmetic.result else 0
    return arrays * arithmetic.result.itemsize + copy
