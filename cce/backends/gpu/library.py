"""Small operations around a filtered step's products, by torch; a backend's kernels may replace them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.gpu import joins
from cce.backends.gpu import plan as plans
from cce.backends.gpu import work as works
from cce.backends.gpu.arrays import DeadMass, Rows, Splits, Tiles, Window
from cce.backends.gpu.plan import Plan
from cce.backends.gpu.work import Work
from cce.backends.problem import Inputs, Maps, Outputs, Problem, Upstream
from cce.spec import Spec


@dataclass(frozen=True)
class Ahead:
    """Rows of ``c`` to gather for the next window while the current one is computed: out_i = c[order_i].

    Attributes:
        c: (V, D) aligned. order: (rows,) int64. out: (rows, D) contiguous; nothing else reads or writes it.
    """

    c: Tensor
    order: Tensor
    out: Tensor


class LibraryOperations:
    """About four hundred small operations of a filtered step; CuPy's kernels instead of them save 1 to 2 ms on an H100.

    ``problem`` and the resolved ``spec`` are those of the call.
    """

    def gathers_ahead(self, problem: Problem) -> bool:
        """Whether :meth:`statistics_ahead` is implemented."""
        return False

    def statistics_ahead(self, problem: Problem, spec: Spec, window: Window, ahead: Ahead) -> None:
        """Like :meth:`cce.backends.gpu.kernels.Kernels.statistics`, while gathering the rows of ``ahead``."""
        raise NotImplementedError

    def joined(
        self, splits: Splits, target_logits: Tensor, targets: Tensor, in_use: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Join the splits into lse (N,), lse_low (N,) and nll (N, K) of :class:`Outputs`, float32; 0 if not in use.

        With M the largest of the splits' maxima and l = log sum_k exp(m_k - M) s_k: lse = M + l rounded, lse_low its
        rounding error, nll = l + (M - target's logit). A target's logit comes from another kernel, and its rounding may
        make it exceed the log-sum-exp: an nll that would be negative is 0. (The log-sum-exp stays that of the logits
        that p is made from, or the softmax would not sum to 1.)

        A row whose log-sum-exp is NaN or infinite has no softmax: its nll and lse_low are NaN. Which of a row's maxima
        and sums are NaN then makes no difference.

        Args:
            target_logits: (N, K) float32. targets: (N, K) int64, -1 for none. in_use: (N,) bool.
        """
        return joins.totals(splits, target_logits, targets, in_use)

    def outputs(
        self,
        problem: Problem,
        splits: Splits,
        target_logits: Tensor,
        targets: Tensor,
        in_use: Tensor,
        order: Tensor | None,
    ) -> Outputs[Tensor]:
        """Join the splits into the outputs of all rows; 0, or -1 for the prediction, if not in use.

        The weighted logit is that of the splits, None where they have none.

        Args:
            target_logits, targets, in_use: as for :meth:`joined`. order: (V,) vocabulary order of the splits, or None.
        """
        lse, lse_low, nll = self.joined(splits, target_logits, targets, in_use)
        return Outputs(
            lse,
            nll,
            lse_low,
            None if splits.gap is None else joins.entropy(splits, splits.gap, lse, lse_low, in_use),
            None if splits.weighted is None else torch.where(in_use, splits.weighted.sum(0), 0),
            None if splits.best is None else joins.prediction(splits.max, splits.best, in_use, problem.v, order),
        )

    def mean_rows(self, problem: Problem, spec: Spec, c: Tensor, order: Tensor | None, out: Tensor) -> None:
        """Write out (T, D): the mean of the rows of ``c`` of each vocabulary block, summed in float32.

        With torch this takes about three times as long on a GPU as reading ``c`` once.

        Args:
            c: (V, D) aligned; order: (V,) int64 or None; out: contiguous, in the products' dtype.
        """
        assert spec.block_v is not None
        entries = torch.arange(problem.v, device=c.device) if order is None else order
        first = torch.arange(0, problem.v, spec.block_v, device=c.device)
        out.copy_(torch.nn.functional.embedding_bag(entries, c, first, mode="mean"))

    def dead_mass(self, problem: Problem, spec: Spec, mass: DeadMass) -> bool:
        """Fill ``mass.out`` with the sums of dx over columns of dead tiles, 0 for live ones; or leave it unchanged.

        ``softcap'(zbar) p (a + h (tile_entropy - log p - H))``, p the tile's mass; zbar, the log of its mean exp(z),
        stands for its logits.

        Returns:
            Whether ``out`` was filled; if not, the caller does the same with torch.
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
        """Fill the maps for the backward from the blocks' statistics, which may be overwritten.

        The map holds the mass exp((max - lse) + (log_sum - lse_low)). It is negated, and at least ``LEAST_HIT``, unless
        the filter's quantity is at most the threshold: (max - lse) - lse_low <= log threshold for "element", and
        likewise the mass's logarithm for "tile". So a block whose quantity is NaN is computed (its mass may be NaN,
        too), and so are all blocks of a row whose lse is not finite. Rows not in use have 0.

        Args:
            lse, lse_low: (N,) float32. in_use: (N,) bool.

        Returns:
            Whether the maps were filled; if not, the caller does the same with torch.
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
        """Rows' order and live tiles, as ``live_blocks`` finds them; ``rows.targets`` holds the targets' places."""
        return Work.of(inputs, problem, spec, maps, upstream)

    def plan(self, live: Tensor, slots: int, pack: int) -> Plan:
        """Plan of the live tiles (T, B), as from :func:`cce.backends.gpu.plan.make`."""
        return plans.make(live, slots, pack)

    def gather_rows(self, e: Tensor, row_order: Tensor, keep: Tensor | None, out: Tensor) -> None:
        """Write out_i = e[row_order_i], or 0 where ``keep`` of that row is False; also used for ``c``.

        Args:
            e: (N, D) aligned; row_order: (rows,) int64, some of the rows; keep: (N,) bool, or None.
            out: (rows, D) contiguous, in the dtype of ``e``.
        """
        works.gather_rows(e, row_order, keep, out)

    def scatter_rows(
        self, spec: Spec, total: Tensor, norm: Tensor | None, row_order: Tensor, keep: Tensor, out: Tensor
    ) -> None:
        """Write out[row_order_i] = total_i norm, rounded, or 0 where ``keep`` of that row is False.

        Args:
            total: (N, D) float32, the first columns of aligned rows; may be overwritten. norm: one float32, or None.
            row_order: (N,) int64; keep: (N,) bool; out: (N, D) contiguous, in any of the three dtypes.
        """
        step = max(1, spec.scratch_bytes // (8 * total.shape[1]))
        works.scatter_rows(total, norm, row_order, step, out)
        out.masked_fill_(~keep[:, None], 0)

    def add_rank_one(self, spec: Spec, out: Tensor, u: Tensor, total: Tensor) -> None:
        """Add u_v total_d to out_vd in float32, rounded once.

        Args:
            out: (V, D) contiguous, in any of the three dtypes. u: (V,) float32. total: (D,) float32.
        """
        step = max(1, spec.scratch_bytes // (16 * out.shape[1]))
        for rows, part in zip(out.split(step), u.split(step), strict=True):
            rows.copy_(torch.addcmul(rows.to(torch.float32), part[:, None], total[None]))
