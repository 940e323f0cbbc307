"""What kernels may replace, and the library does otherwise: the small operations around a filtered step's products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.gpu import plan as plans
from cce.backends.gpu import work as works
from cce.backends.gpu.arrays import Formula, Rows, Splits, Tiles
from cce.backends.gpu.plan import Plan
from cce.backends.gpu.work import Work
from cce.backends.problem import Inputs, Maps, Problem, Upstream
from cce.backends.shared.pair import finite, pair
from cce.spec import Spec


@dataclass(frozen=True)
class Ahead:
    """Rows of ``c`` that are gathered for the next window while one is worked on: out_i = c[order_i].

    Attributes:
        c: (V, D) aligned. order: (rows,) int64. out: (rows, D) contiguous; nothing else reads or writes it.
    """

    c: Tensor
    order: Tensor
    out: Tensor


class LibraryOperations:
    """Some four hundred small operations of a filtered step; kernels of CuPy's instead save 1 to 2 ms on an H100.

    ``problem`` and the resolved ``spec`` are those of the call.
    """

    def gathers_ahead(self, problem: Problem) -> bool:
        """Whether there is :meth:`statistics_ahead`."""
        return False

    def statistics_ahead(
        self,
        problem: Problem,
        spec: Spec,
        e: Tensor,
        c: Tensor,
        formula: Formula,
        weight: Tensor | None,
        first: int,
        splits: Splits,
        tiles: Tiles | None,
        ahead: Ahead,
    ) -> None:
        """As :meth:`cce.backends.gpu.kernels.Kernels.statistics`, and gathers meanwhile what is ``ahead``."""
        raise NotImplementedError

    def joined(
        self, splits: Splits, target_logits: Tensor, targets: Tensor, in_use: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """lse (N,), lse_low (N,) and nll (N, K) as :class:`Outputs` has them, float32; 0 if not in use.

        With M the largest of the splits' maxima and l = log sum_k exp(m_k - M) s_k: lse = M + l rounded, lse_low what
        was rounded off, nll = l + (M - target's logit). A target's logit comes from another kernel, and may exceed the
        log-sum-exp by its rounding: where an nll were negative, it is 0. (The log-sum-exp stays that of the logits that
        p is made from, or the softmax would not sum to 1.)

        A row whose log-sum-exp is NaN or infinite has no softmax: its nll and lse_low are NaN. Which of a row's maxima
        and sums are NaN then makes no difference.

        Args:
            target_logits: (N, K) float32. targets: (N, K) int64, -1 for none. in_use: (N,) bool.
        """
        m = splits.max.amax(0)
        log_sum = ((splits.max - finite(m)).exp_() * splits.sum).sum(0).log_()  # NaN where m is inf
        m = torch.where(m > -torch.inf, m, log_sum)  # NaN where a maximum left it out
        named = targets >= 0
        nll = log_sum[:, None] + (m[:, None] - target_logits)
        lse, lse_low = pair(m, log_sum)
        nll = torch.where(lse.isfinite()[:, None], nll.clamp(min=0), torch.nan)
        nll = torch.where(named & in_use[:, None], nll, 0)
        return torch.where(in_use, lse, 0), torch.where(in_use, lse_low, 0), nll

    def mean_rows(self, problem: Problem, spec: Spec, c: Tensor, order: Tensor | None, out: Tensor) -> None:
        """out (T, D): the mean of the rows of ``c`` of each vocabulary block, summed in float32.

        The library's takes about three times as long on a GPU as reading ``c`` once.

        Args:
            c: (V, D) aligned; order: (V,) int64 or None; out: contiguous, in the products' dtype.
        """
        assert spec.block_v is not None
        entries = torch.arange(problem.v, device=c.device) if order is None else order
        first = torch.arange(0, problem.v, spec.block_v, device=c.device)
        out.copy_(torch.nn.functional.embedding_bag(entries, c, first, mode="mean"))

    def dead_mass(
        self,
        problem: Problem,
        spec: Spec,
        rows: Rows,
        maps: Maps[Tensor],
        row_order: Tensor,
        live: Tensor,
        first: int,
        out: Tensor,
    ) -> bool:
        """Fills ``out`` with the sums of dx over the columns of dead tiles, 0 of live ones; or leaves it.

        ``softcap'(zbar) p (a + h (tile_entropy - log p - H))``, p the tile's mass; zbar, the log of its mean exp(z),
        stands for its logits.

        Args:
            rows, maps: by row of the problem.
            row_order: (N,) int64; live: (T, B) bool, contiguous.
            first: vocabulary block of the first row of ``out`` (blocks, N), whose columns are in ``row_order``.

        Returns:
            Whether it did; if not, the library does.
        """
        return False

    def fill_maps(
        self,
        problem: Problem,
        spec: Spec,
        lse: Tensor,
        lse_low: Tensor,
        in_use: Tensor,
        tiles: Tiles,
        maps: Maps[Tensor],
    ) -> bool:
        """Fills the maps with what the backward reads, from the blocks' statistics, which may be overwritten.

        The mass exp((max - lse) + (log_sum - lse_low)); negated, and at least ``LEAST_HIT``, unless the filter's
        quantity is at most the threshold: (max - lse) - lse_low <= log threshold for "element", the mass's logarithm
        for "tile". So a block whose quantity is NaN is computed (its mass may be NaN, too), and so are all blocks of a
        row whose lse is not finite. 0 of rows not in use.

        Args:
            lse, lse_low: (N,) float32. in_use: (N,) bool.

        Returns:
            Whether it did; if not, the library does.
        """
        return False

    def work_list(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        rows: Rows,
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Work:
        """The rows' order and the live tiles, as ``live_blocks`` finds them; ``rows``: the places."""
        return Work.of(inputs, problem, spec, maps, upstream)

    def plan(self, live: Tensor, slots: int, pack: int) -> Plan:
        """What :func:`cce.backends.gpu.plan.make` makes of the live tiles (T, B)."""
        return plans.make(live, slots, pack)

    def gather_rows(self, e: Tensor, row_order: Tensor, keep: Tensor | None, out: Tensor) -> None:
        """out_i = e[row_order_i], 0 where ``keep`` of that row is False; of ``c`` as well.

        Args:
            e: (N, D) aligned; row_order: (rows,) int64, some of the rows; keep: (N,) bool, or None.
            out: (rows, D) contiguous, in the dtype of ``e``.
        """
        works.gather_rows(e, row_order, keep, out)

    def scatter_rows(self, spec: Spec, total: Tensor, norm: Tensor | None, row_order: Tensor, out: Tensor) -> None:
        """out[row_order_i] = total_i norm, rounded.

        Args:
            total: (N, D) float32, the first columns of aligned rows; may be overwritten. norm: one float32, or None.
            row_order: (N,) int64; out: (N, D) contiguous, in any of the three dtypes.
        """
        step = max(1, spec.scratch_bytes // (8 * total.shape[1]))
        works.scatter_rows(total, norm, row_order, step, out)
