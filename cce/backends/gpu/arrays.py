"""The arrays and sizes that the kernels of a method read and write, one class a purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cce.backends.gpu.plan import Plan


@dataclass(frozen=True)
class Sizes:
    """Tiles of a problem's kernels, as far as the host has to know them.

    Attributes:
        forward_rows, forward_columns: of a tile of :meth:`Kernels.statistics`; a split is a run of whole tiles. Where
            there are maps, columns are a multiple of ``spec.block_v``.
        gradient_rows, gradient_columns: of a tile of :meth:`Kernels.gradient`; columns at most 256.
        pack: live tiles of one row block that :meth:`Kernels.live` computes at a time, at most.
        programs: blocks of threads that run at the same time.
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

    z is -inf where the bias is, also under a softcap. tanh(y) has a relative error of a few units in the last place:
    by exponentials alone it loses softcap times that of a small logit.

    Attributes:
        bias: (columns,) float32, contiguous, of the columns of the ``c`` at hand, or None.
        ieee: float32 operands are not rounded to tf32.
    """

    bias: Tensor | None
    scale: float
    softcap: float | None
    ieee: bool


@dataclass(frozen=True)
class Splits:
    """Per split of the vocabulary and row: (S, N) each, contiguous.

    Split s of a window of C tiles has the tiles ``s C // S`` to ``(s + 1) C // S``.

    Attributes:
        max, sum: m = largest logit, sum exp(z - m); -inf and 0 before the first tile. The sum is NaN where a logit is
            NaN or inf, whatever m is; but m is inf where the largest is.
        gap: sum exp(z - m) (m - z), terms with exp(z - m) = 0 left out; or None. The entropy is log sum + gap / sum.
        weighted: sum u_v z_v of the window's columns, so NaN where 0 meets -inf, as in PyTorch; or None.
        best: int32, place of the first largest logit; or None.
    """

    max: Tensor
    sum: Tensor
    gap: Tensor | None
    weighted: Tensor | None
    best: Tensor | None


@dataclass(frozen=True)
class Tiles:
    """Per vocabulary block of ``spec.block_v`` places and row: (T', N) float32 each, contiguous.

    T' rows are there for every whole tile of the forward: a kernel may write the blocks of its last tile that have no
    columns.

    The block's log-sum-exp is ``max + log_sum``: two numbers, since a large maximum would round the other away.

    Attributes:
        max: the block's largest logit; -inf where all are -inf.
        log_sum: log sum exp(z - max); 0 where all are -inf, NaN where one is NaN.
        entropy: of the softmax within the block, 0 where all are -inf; or None.
    """

    max: Tensor
    log_sum: Tensor
    entropy: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Per row of the problem, what a logit's gradient is made from; float32, contiguous, in the rows' own order.

    ``dx_j = softcap'(z) (p_j (a + h ((lse - z_j) + (lse_low - entropy))) - sum_k g_k [j = targets_k] + s u_j)`` with
    ``p_j = exp((z_j - lse) - lse_low)``, both differences in this order: logits may share a large offset.

    a, g, h and s have been multiplied by the logit scale, so that dx is the gradient of e c^T; softcap'(z) is
    ``1 - (z / softcap)^2``, 0 where z = -inf. Where z_j = -inf, p_j is 0 and so are its terms (not those of a target),
    but NaN in a row whose lse is -inf or inf, for there lse_low is NaN: as in PyTorch, a row without a finite logit, or
    with an infinite one, has no softmax.

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
    """An exact backward, but for the window of the vocabulary.

    Attributes:
        e: (N, D) aligned. formula: its bias is (V,).
        weight: (V,) float32, u of the entries, with ``rows.s`` and a softcap only.
        column_sums: they are wanted.
    """

    e: Tensor
    formula: Formula
    rows: Rows
    weight: Tensor | None
    column_sums: bool


#: Computes dx of a window; what its arguments are, :meth:`Kernels.gradient` says.
GradientOfWindow = Callable[[Tensor, int, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Live:
    """A filtered backward, but for the number of the chunk; see :class:`cce.backends.gpu.plan.Plan` for its tables.

    Row block b holds rows ``row_order[b BLOCK_N : (b + 1) BLOCK_N]``, block t the places from ``t BLOCK_V``; the last
    of each may be short. Rows with ``keep`` False want no gradient: their dx is 0, and their ``e`` may be NaN.

    Attributes:
        e: (N, D) aligned. sorted_rows: it is a copy in ``row_order``, with zeros where ``keep`` is False.
        c: (V, D) aligned. order: (V,) int64 or None. formula: its bias is (V,), by entry.
        row_order: (N,) int64. keep: (N,) bool.
        dz: (slots + 1, BLOCK_N, BLOCK_V) in the products' dtype: dx of live tiles; the last slot is for nobody's use.
        column_sums: (slots, BLOCK_V) float32, of dx, not rounded; None where there is no dbias.
        de: (N, D) float32, rows in ``row_order``; holds what to add to. None if not wanted.
        dc: (V, D') contiguous, in the dtype of ``c`` as the user has it, D' <= D; every row of a chunk's blocks is
            written, times ``norm``. None if not wanted.
        dbias: (V,) float32, likewise.
        mass_e: (T, D) float32: added to every entry's row of dC, over the number of its block's columns; None: nothing.
        mass: (T,) float32, likewise for dbias.
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
