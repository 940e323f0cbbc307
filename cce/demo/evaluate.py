"""How accurate the filter is on the trained model: gradients against float64, with and without compensation.

All computations start from the same hidden states and head rounded to bfloat16, the dtype the filter is made
for, so that what differs is the arithmetic alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import cce
from cce.demo.train import Loss, cce_loss, dense_loss

DENSE, COMPENSATED, FILTERED = "dense, bfloat16", "cce, filtered and compensated", "cce, filtered only"

COMPENSATED_SPEC = cce.Spec(filter="element")
FILTERED_SPEC = cce.Spec(filter="element", compensate=False)


@dataclass(frozen=True)
class Accuracy:
    """What the filter leaves out, and what that costs.

    Attributes:
        live_fraction: of the tiles of the logits that the backward computes.
        threshold: softmax values up to this may be left out.
        errors: relative errors (of dE, of dC) in the Frobenius norm, for each computation.
    """

    live_fraction: float
    threshold: float
    errors: dict[str, tuple[float, float]]


def evaluate(e: Tensor, c: Tensor, targets: Tensor, backend: str) -> Accuracy:
    """The filter on hidden states e (N, D) of a trained model with the head c (V, D)."""
    e, c = e.bfloat16(), c.bfloat16()
    exact = gradients(dense_loss, e.cpu().double(), c.cpu().double(), targets.cpu())
    found = {DENSE: dense_bfloat16(e.cpu(), c.cpu(), targets.cpu())}
    for name, spec in ((COMPENSATED, COMPENSATED_SPEC), (FILTERED, FILTERED_SPEC)):
        found[name] = gradients(cce_loss(backend, spec), e, c, targets)
    return Accuracy(
        live_fraction=cce.live_fraction(e, c, targets, spec=COMPENSATED_SPEC, backend=backend),
        threshold=cce.explain(e, c, targets, spec=COMPENSATED_SPEC).spec.threshold or 0.0,
        errors={name: (relative_error(de, exact[0]), relative_error(dc, exact[1])) for name, (de, dc) in found.items()},
    )


def gradients(loss: Loss, e: Tensor, c: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """dE (N, D) and dC (V, D) of ``loss``."""
    leaves = [x.detach().requires_grad_() for x in (e, c)]
    de, dc = torch.autograd.grad(loss(leaves[0], leaves[1], targets), leaves)
    return de, dc


def dense_bfloat16(e: Tensor, c: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """dE and dC as a GPU computes them: bfloat16 operands and results, sums within a product in float32.

    Written out in float32 products of rounded operands, because a CPU without bfloat16 matrix instructions
    would take minutes; the cross-entropy itself runs in float32, as under autocast.
    """
    logits = (e.float() @ c.float().T).bfloat16().float().requires_grad_()
    (dz,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    dz = dz.bfloat16().float()
    return (dz @ c.float()).bfloat16(), (dz.T @ e.float()).bfloat16()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of ``exact``."""
    return float((found.double().to(exact.device) - exact).norm() / exact.norm())
