"""The kernels of a pass that computes gradients along with the loss, for rows whose logits are all held at once.

With few rows such problems are short, so host time counts. An operation or two of torch elsewhere is therefore a kernel
here, and a launch should cost little. Conventions are those of ``kernels.py``. *q* is exp(z - m), m the largest logit
of the row in the tile: float32 for float32 factors, float16 for both 16-bit dtypes; the gradient replaces it in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula
from cce.backends.problem import Problem
from cce.spec import Spec


class OnePassKernels(ABC):
    """Kernels of one pass.

    Attributes:
        any_layout: as of :class:`cce.backends.gpu.kernels.Kernels`.
    """

    any_layout = False

    def of_problem(self, problem: Problem, spec: Spec) -> OnePassKernels:
        """Kernels as configured for a problem, whose :meth:`columns` and the methods with tiles belong together."""
        return self

    @abstractmethod
    def columns(self, dtype: torch.dtype) -> int:
        """Columns of a tile of :meth:`store`, by the dtype of the products; a multiple of 16."""

    @abstractmethod
    def prepare(self, targets: Tensor, v: int, ignore_index: int, out: Tensor, weights: Tensor | None) -> None:
        """Write out = targets, -1 for ``ignore_index``; any other value outside [0, v) is a device-side assertion.

        Args:
            targets: integers, contiguous. out: int64, of the same size.
            weights: float32, of the same size, at most ``MOST_WEIGHED``: 1 / (number of targets) for a target, 0 for
                -1, NaN if there are no targets; or None.
        """

    @abstractmethod
    def target_logits(
        self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor, used_e: Tensor | None
    ) -> None:
        """Like :meth:`cce.backends.gpu.kernels.Kernels.target_logits`, and copy ``e`` to ``used_e`` (N, D).

        ``used_e`` has zeros in rows without a target; it is contiguous, in the dtype of ``e``.
        """

    @abstractmethod
    def store(self, e: Tensor, c: Tensor, formula: Formula, q: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
        """Store q of all rows and a window of the vocabulary, and m and the sum of q for each row and tile.

        Args:
            e: (N, D) aligned; c: (C, D) aligned.
            q: (N, C) of the products' dtype, but holding the bits of float16 where that has 16 bits; unit stride, pitch
                a multiple of 16. Columns from C to the next multiple of 8 may be written.
            tile_max, tile_sum: (T, N) float32, contiguous.
        """

    @abstractmethod
    def join(
        self,
        tile_max: Tensor,
        tile_sum: Tensor,
        target_logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        nll: Tensor,
    ) -> None:
        """Join the tiles into lse, lse_low (N,) and nll (N, K), like :meth:`cce.backends.gpu.kernels.Kernels.joined`.

        The results are 0 where a row has no target. ``target_logits`` is (N, K) float32, ``targets`` (N, K) int64, -1
        for none.
        """

    @abstractmethod
    def scale(
        self,
        q: Tensor,
        tile_max: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        nll: Tensor,
        targets: Tensor,
        a: Tensor,
        g: Tensor,
        softcap: float | None,
    ) -> None:
        """Replace q by dz = a p - sum_k g_k [j = target_k], p = q exp((m - lse) - lse_low), in the products' dtype.

        At a target p is exp(-nll). Under a softcap dz is multiplied by its derivative 1 - (z / softcap)^2, with z = m +
        log q, or lse - nll at a target; a masked entry's is 0.

        A row without a target gets zeros, whatever it holds; so does a finite row whose a
        and g are all 0. A tile whose m is -inf has p = 0, or NaN where the row's lse is -inf or inf.

        Args:
            q: (N, V) as :meth:`store` left it; a: (N,) any stride; g: (N, K). a and g include the logit scale.
        """

    @abstractmethod
    def value(self, weights: Tensor, nll: Tensor, out: Tensor) -> None:
        """Write out = sum_ik weights_ik nll_ik, a tensor of one float32."""

    @abstractmethod
    def multiply(self, x: Tensor, y: Tensor | None, factor: Tensor, targets: Tensor, is_de: bool) -> None:
        """Multiply x and y, contiguous, in place by ``factor``, a float32; if that is 1, neither is read or written.

        But whatever they hold and the factor is: both become 0 if no row has a target and the factor is not finite, and
        so do the rows of an x that ``is_de``, (N, D), without a target.

        Args:
            targets: (N, K) int64, contiguous, -1 for none.
        """
