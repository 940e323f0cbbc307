"""Accuracy of the filter on the trained model: gradients against float64, with and without compensation.

All computations start from the same hidden states and head rounded to bfloat16, the dtype the filter is made for, so
that they differ in the arithmetic alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import cce
from cce.demo.train import Loss, cce_loss, dense_loss

#: Specs by name. The first two have the default order of the vocabulary, by mean logit, so that similar entries share a
#: tile.
FILTERS = {
    "filtered": cce.Spec(filter="element", compensate=False),
    "filtered, compensated": cce.Spec(filter="element"),
    "filtered, compensated, unordered": cce.Spec(filter="element", vocab_order="natural"),
}


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one computation of the gradients, and the share of the tiles it computes.

    Attributes:
        name: name of the computation.
        live_fraction: share of the tiles of logits that the backward computes.
        de, dc: relative errors of dE and dC against float64, in the Frobenius norm.
    """

    name: str
    live_fraction: float
    de: float
    dc: float


def evaluate(e: Tensor, c: Tensor, targets: Tensor, backend: str) -> list[Accuracy]:
    """Evaluate the filter on hidden states e (N, D) of a trained model with the head c (V, D)."""
    e, c = e.bfloat16(), c.bfloat16()
    exact = gradients(dense_loss, e.cpu().double(), c.cpu().double(), targets.cpu())
    dense = dense_bfloat16(e.cpu(), c.cpu(), targets.cpu())
    rows = [Accuracy("dense", 1.0, *relative_errors(dense, exact))]
    for name, spec in FILTERS.items():
        live = cce.live_fraction(e, c, targets, spec=spec, backend=backend)
        found = gradients(cce_loss(backend, spec), e, c, targets)
        rows.append(Accuracy(name, live, *relative_errors(found, exact)))
    return rows


def gradients(loss: Loss, e: Tensor, c: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients dE (N, D) and dC (V, D) of ``loss``."""
    leaves = [x.detach().requires_grad_() for x in (e, c)]
    de, dc = torch.autograd.grad(loss(leaves[0], leaves[1], targets), leaves)
    return de, dc


def dense_bfloat16(e: Tensor, c: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients dE and dC as on a GPU: bfloat16 operands and results, sums within a product in float32.

    They are computed by float32 products of rounded operands, because a CPU without bfloat16 matrix instructions would
    take minutes; the cross-entropy itself runs in float32, as under autocast.
    """
    logits = (e.float() @ c.float().T).bfloat16().float().requires_grad_()
    (dz,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    dz = dz.bfloat16().float()
    return (dz @ c.float()).bfloat16(), (dz.T @ e.float()).bfloat16()


def relative_errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative errors of dE and dC: the norm of the difference divided by that of the exact gradient."""
    de, dc = (float((x.double().cpu() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))
    return de, dc
