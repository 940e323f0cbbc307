"""Cases whose logits all share a large offset: exactly, so that what they should give is that of the logits without it.

The factors lie on grids whose products, and sums of them with the offset, are numbers of the accumulation dtype: a
logit has no error, whatever the order it is summed in. Then outputs and gradients must be as good as those of the
centred logits, whose bounds are of the order of the differences between them; an error relative to the offset shows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cce.backends.problem import Gradients, Inputs, Outputs
from cce.testing.cases import Case

Array = np.ndarray


def on_grids(case: Case, e: Tensor, c: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors and bias such that products are multiples of the offset's last bit, or of 2**-8; a last column of 0."""
    step = max(2.0**-8, abs(case.offset) * (2.0**-52 if case.e_dtype == torch.float64 else 2.0**-23))
    of_e = min(1.0, 2.0 ** (math.log2(step) // 2))
    of_c = step / of_e

    def rounded(x: Tensor, unit: float) -> Tensor:
        return (x * max(1.0, unit) / unit).round() * unit

    e, c = rounded(e, of_e), rounded(c, of_c)
    if case.offset_by == "product":
        e[:, -1], c[:, -1] = 0.0, 0.0
    return e, c, None if bias is None else rounded(bias, of_c)


def with_offset(case: Case, inputs: Inputs[Tensor]) -> Inputs[Tensor]:
    """The inputs with the offset: a last column of ``e`` equal to it, of ``c`` equal to 1; or in the bias."""
    if case.offset_by == "bias":
        assert inputs.bias is not None
        return replace(inputs, bias=inputs.bias + case.offset)
    e, c = inputs.e.clone(), inputs.c.clone()
    e[:, -1], c[:, -1] = case.offset, 1.0
    return replace(inputs, e=e, c=c)


def centred(case: Case, inputs: Inputs[Array], zero: str) -> Inputs[Array]:
    """The float64 inputs of :func:`with_offset` without it: a column of zeros in ``e`` or in ``c``.

    Either gives the same logits. With zeros in ``e`` all gradients but dC's last column are those of the given
    inputs; with zeros in ``c``, dC is.
    """
    if not case.offset:
        return inputs
    if case.offset_by == "bias":
        assert inputs.bias is not None
        return replace(inputs, bias=inputs.bias - case.offset)
    found = {"e": inputs.e.copy(), "c": inputs.c.copy()}
    found[zero][:, -1] = 0.0
    return replace(inputs, **found)


def recentred(case: Case, inputs: Inputs[Array], outputs: Outputs[Array]) -> Outputs[Array]:
    """A backend's outputs as those of the centred logits: the offset is taken from both parts of the log-sum-exp."""
    if not case.offset:
        return outputs
    low = 0.0 if outputs.lse_low is None else outputs.lse_low
    weighted = outputs.weighted_logit
    if weighted is not None:
        weighted = weighted - case.logit_scale * case.offset * (
            1.0 if inputs.logit_weight is None else inputs.logit_weight.sum()
        )
    lse = (outputs.lse - case.logit_scale * case.offset) + low
    return replace(outputs, lse=lse, weighted_logit=weighted)


def without_column(case: Case, gradients: Gradients[Array]) -> Gradients[Array]:
    """dC without the column that holds the offset's part, which would hide the others' errors."""
    if not case.offset or case.offset_by == "bias" or gradients.dc is None:
        return gradients
    return replace(gradients, dc=gradients.dc[:, :-1])
