"""Arrays and sizes that the kernels of a method read and write, one class per purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cce.backends.gpu.plan import Plan
from cce.backends.problem import Maps


@dataclass(frozen=True)
class Sizes:
    """Tile sizes of a problem's kernels, as far as the host has to know them.

    Attributes:
        forward_rows, forward_columns: tile of :meth:`Kernels.statistics`; a split is a run of whole tiles. Where there
            are maps, forward_columns is a multiple of ``spec.block_v``.
        gradient_rows, gradient_columns: tile of :meth:`Kernels.gradient`; gradient_columns is at most 256.
        pack: largest number of live tiles of one row block that :meth:`Kernels.live` computes at a time.
        programs: thread blocks that run at the same time.
    """

    forward_rows: int
    forward_columns: int
    gradient_rows: int
    gradient_columns: int
    pack: int
    programs: int


@dataclass(frozen=True)
class Formula:
    """A logit from a product x = e c^T: z = softcap tanh(scale (x + bias) / softcap), or scale (x + bias).

    z is -inf where the bias is, also under a softcap. tanh(y) must have a relative error of a few units in the last
    place for small y, too: computed by exponentials alone, its absolute error, times the softcap, would swamp a small
    logit.

    Attributes:
        bias: (columns,) float32, contiguous, bias of the columns of the given ``c``, or None.
        ieee: whether float32 operands are multiplied without rounding to tf32.
    """

    bias: Tensor | None
    scale: float
    softcap: float | None
    ieee: bool


@dataclass(frozen=True)
class Splits:
    """Statistics of each split of the vocabulary and row: (S, N) each, contiguous.

    Split s of a window of C tiles has the tiles ``s C // S`` to ``(s + 1) C // S``.

    Attributes:
        max, sum: m = largest logit, sum exp(z - m); -inf and 0 before the first tile. The sum is NaN where a logit is
            NaN, and NaN or inf where one is inf, whatever m is; but m is inf where the largest is.
        gap: sum exp(z - m) (m - z), without the terms where exp(z - m) = 0; or None. The entropy is log sum + gap /
            sum.
        weighted: sum u_v z_v over the window's columns, hence NaN where 0 meets -inf, as in PyTorch; or None.
        best: int32, place of the first largest logit; or None.
    """

    max: Tensor
    sum: Tensor
    gap: Tensor | None
    weighted: Tensor | None
    best: Tensor | None


@dataclass(frozen=True)
class Tiles:
    """Statistics of each vocabulary block of ``spec.block_v`` places and row: (T', N) float32 each, contiguous.

    T' counts the blocks of whole tiles of the forward: a kernel may write the blocks of its last tile that have no
    columns.

    The block's log-sum-exp is ``max + log_sum``: two numbers, since a large maximum would round the other away.

    Attributes:
        max: the block's largest logit; -inf where all are -inf.
        log_sum: log sum exp(z - max); 0 where all are -inf, NaN where one is NaN, NaN or inf where one is inf.
        entropy: entropy of the softmax within the block, 0 where all are -inf; or None.
    """

    max: Tensor
    log_sum: Tensor
    entropy: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Values of each row of the problem that make up a logit's gradient; float32, contiguous, in the rows' own order.

    ``dx_j = softcap'(z) (p_j (a + h ((lse - z_j) + (lse_low - entropy))) - sum_k g_k [j = targets_k] + s u_j)`` with
    ``p_j = exp((z_j - lse) - lse_low)``, both differences in this order: logits may share a large offset.

    a, g, h and s have been multiplied by the logit scale, so that dx is the gradient of e c^T; softcap'(z) is
    ``1 - (z / softcap)^2``, 0 where z = -inf. Where z_j = -inf, p_j and its terms are 0 (but not those of a target). In
    a row whose lse is -inf or inf they are NaN, as lse_low is: as in PyTorch, a row without a finite logit, or with an
    infinite one, has no softmax.

    Attributes:
        lse, lse_low, a: (N,). g: (N, K). entropy, h: (N,) or None. s: (N,) or None.
        targets: (N, K) int32 places; -1 for none.
    """

    lse: Tensor
    lse_low: Tensor
    a: Tensor
    g: Tensor
    targets: Tensor
    entropy: Tensor | None
    h: Tensor | None
    s: Tensor | None


@dataclass(frozen=True)
class Dense:
    """Arguments of an exact backward, all but the window of the vocabulary.

    Attributes:
        e: (N, D) aligned. formula: its bias is (V,).
        weight: (V,) float32, weights u of the entries; only with ``rows.s`` and a softcap.
        column_sums: whether the column sums of dx are wanted.
    """

    e: Tensor
    formula: Formula
    rows: Rows
    weight: Tensor | None
    column_sums: bool


#: Function that computes dx of a window; :meth:`Kernels.gradient` describes its arguments.
GradientOfWindow = Callable[[Tensor, int, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Live:
    """Arguments of a filtered backward, all but the chunk's number; :class:`cce.backends.gpu.plan.Plan` has the tables.

    Row block b holds rows ``row_order[b BLOCK_N : (b + 1) BLOCK_N]``, vocabulary block t the places from ``t BLOCK_V``;
    the last of each may be short. Rows with ``keep`` False need no gradient: their dx is 0, and their ``e`` may be NaN.

    Attributes:
        e: (N, D) aligned. sorted_rows: it is a copy in ``row_order``, with zeros where ``keep`` is False.
        c: (V, D) aligned, the entries of the plan's vocabulary blocks: the whole vocabulary, or a run of it without an
            order. order: (V,) int64 or None. formula: its bias is (V,), by entry.
        row_order: (N,) int64. keep: (N,) bool.
        dz: (slots + 1, BLOCK_N, BLOCK_V) in the products' dtype: dx of live tiles; the last slot is never used.
        column_sums: (slots, BLOCK_V) float32, column sums of dx before rounding; None where there is no dbias.
        de: (N, D) float32, rows in ``row_order``; dE is added to its contents. None if not wanted.
        dc: (V, D') contiguous, in the dtype of the user's ``c``, D' <= D; every row of a chunk's blocks is written,
            times ``norm``. None if not wanted.
        dbias: (V,) float32, likewise.
        mass_e: (T, D) float32, added to dC of every entry in the block, divided by the block's number of columns; or
            None.
        mass: (T,) float32, likewise for dbias; or None.
        norm: a tensor of one float32, or None.
        row_of: (N,) int32, ``row_order``, or -1 where ``keep`` is False; or None.
    """

    plan: Plan
    e: Tensor
    sorted_rows: bool
    c: Tensor
    order: Tensor | None
    formula: Formula
    rows: Rows
    row_order: Tensor
    keep: Tensor
    dz: Tensor
    column_sums: Tensor | None
    de: Tensor | None
    dc: Tensor | None
    dbias: Tensor | None
    mass_e: Tensor | None
    mass: Tensor | None
    norm: Tensor | None
    row_of: Tensor | None = None


@dataclass(frozen=True)
class Window:
    """Window of the vocabulary, with the memory for its statistics.

    Attributes:
        e: (N, D) aligned.
        c: (C, D) aligned, the rows of ``c`` at places ``first`` to ``first + C``.
        formula: formula of the logits; a bias is that of the window.
        weight: (C,) float32, weights u of these places; only with ``splits.weighted``.
        first: a multiple of the forward's columns. Where it is not 0, each split continues from the contents of the
            split of the same number.
        splits, tiles: the results.
        in_use: (N,) bool, rows that count; a kernel may leave out a block that has none. None if all do.
    """

    e: Tensor
    c: Tensor
    formula: Formula
    weight: Tensor | None
    first: int
    splits: Splits
    tiles: Tiles | None
    in_use: Tensor | None = None


@dataclass(frozen=True)
class DeadMass:
    """Arguments for the sums of dx over the columns of dead tiles.

    Attributes:
        rows, maps: in the order of the problem's rows.
        row_order: (N,) int64. live: (T, B) bool, contiguous.
        first: vocabulary block of the first row of ``out``.
        out: (blocks, N), with its columns in ``row_order``.
    """

    rows: Rows
    maps: Maps[Tensor]
    row_order: Tensor
    live: Tensor
    first: int
    out: Tensor
