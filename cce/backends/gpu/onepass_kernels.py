"""The kernels of a pass that computes gradients along with the loss: what a GPU backend brings for few rows.

Such problems are short: the host's work counts. So what is an operation or two of the library elsewhere is a kernel
here, and a launch should cost little. Conventions are those of ``kernels.py``; *q* is exp(z - m), m the largest logit
of the row in the tile: float32 of float32 factors, of others float16 whatever their dtype, in whose place the gradient
comes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula


class OnePassKernels(ABC):
    """For problems without a softcap."""

    @abstractmethod
    def columns(self, dtype: torch.dtype) -> int:
        """Of a tile of :meth:`store`, by the dtype of the products; a multiple of 16."""

    @abstractmethod
    def prepare(self, targets: Tensor, v: int, ignore_index: int, out: Tensor, weights: Tensor | None) -> None:
        """out = targets, -1 for ``ignore_index``; another outside [0, v) is a device-side assertion.

        Args:
            targets: integers, contiguous. out: int64, as large.
            weights: float32, as large: 1 / the number of targets for each, 0 for none, NaN if there is none; or None.
                At most ``MOST_WEIGHED`` of them.
        """

    @abstractmethod
    def target_logits(
        self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor, used_e: Tensor | None
    ) -> None:
        """As :meth:`cce.backends.gpu.kernels.Kernels.target_logits`; ``used_e`` (N, D) gets ``e``.

        With zeros in rows without a target; contiguous, in the dtype of ``e``.
        """

    @abstractmethod
    def store(self, e: Tensor, c: Tensor, formula: Formula, q: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
        """q of all rows and a window of the vocabulary, with m and the sum of q of each row and tile.

        Args:
            e: (N, D) aligned; c: (C, D) aligned.
            q: (N, C) of the products' dtype, whose bits are those of float16; unit stride, pitch a multiple of 16. The
                columns after C may be written, as far as the next multiple of 8.
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
        """lse, lse_low (N,) and nll (N, K) of the tiles, as :meth:`cce.backends.gpu.kernels.Kernels.joined` has them.

        0 where a row has no target. ``target_logits`` (N, K) float32, ``targets`` (N, K) int64; -1 for none.
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
    ) -> None:
        """q becomes dz = a p - sum_k g_k [j = target_k], p = q exp((m - lse) - lse_low), in the products' dtype.

        At a target p is exp(-nll). A row without a target gets zeros, whatever it holds; so does one whose a and g are
        all 0, if it is finite. A tile whose m is -inf has p = 0, but NaN where the row's lse is -inf or inf.

        Args:
            q: (N, V) as :meth:`store` left it; a: (N,) any stride; g: (N, K). Multiplied by the scale.
        """

    @abstractmethod
    def value(self, weights: Tensor, nll: Tensor, out: Tensor) -> None:
        """out = sum_ik weights_ik nll_ik, a tensor of one float32."""

    @abstractmethod
    def multiply(self, x: Tensor, y: Tensor | None, factor: Tensor) -> None:
        """x and y, contiguous, times ``factor``, a float32, in place; nothing is read or written where that is 1."""
