"""Logits before they are computed: a product with its scale and softcap, and the loss they become."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cce.functional import loss


@dataclass(frozen=True)
class Product:
    """Product ``z = scale * (e c^T + bias)``, or ``cap * tanh`` of it.

    Attributes:
        e: (..., D).
        c: (V, D).
        bias: (V,) or None.
        scale: factor of the product, before tanh.
        cap: factor of tanh; None without tanh.
    """

    e: Tensor
    c: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.e.shape[:-1], self.c.shape[0])

    def times(self, factor: float) -> Product:
        if self.cap is None:
            return replace(self, scale=self.scale * factor)
        return replace(self, cap=self.cap * factor)

    def times_tensor(self, factor: Tensor) -> Product:
        """Multiply by a learned scale, without tanh: ``e`` is multiplied, through which it gets its gradient."""
        return replace(self, e=self.e * factor, bias=None if self.bias is None else self.bias * factor)

    def plus_bias(self, bias: Tensor) -> Product:
        """Add a bias, before tanh."""
        bias = bias / self.scale
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    def plus(self, other: Product) -> Product:
        """Add another product, before tanh: ``x w^T + h b^T`` is ``[x, h] [w, b]^T``.

        So a LoRA head is exact without a merged weight, even if ``h`` went through dropout. The dtype is that of the
        part with more columns, for LoRA the frozen weight: a float32 adapter must not cause a float32 copy of a bf16
        vocabulary.
        """
        parts = (self, other)
        dtype = max(parts, key=lambda part: part.c.shape[1]).c.dtype
        e = [(part.e if part.scale == 1 else part.e * part.scale).to(dtype) for part in parts]
        biases = [part.bias * part.scale for part in parts if part.bias is not None]
        bias = None if not biases else biases[0] if len(biases) == 1 else biases[0] + biases[1]
        return Product(torch.cat(e, dim=-1), torch.cat([part.c.to(dtype) for part in parts], dim=1), bias)

    def entries(self, of: slice) -> Product:
        """Restrict the product to a part of the vocabulary."""
        return replace(self, c=self.c[of], bias=None if self.bias is None else self.bias[of])

    def loss(self, targets: Tensor, **options: Any) -> Tensor:
        """Compute :func:`cce.loss` of the logits; ``options`` are its options except scale and softcap."""
        # cap * tanh(scale * u) is softcap * tanh(logit_scale * u / softcap).
        scale = self.scale if self.cap is None else self.scale * self.cap
        return loss(self.e, self.c, targets, self.bias, softcap=self.cap, logit_scale=scale, **options)
