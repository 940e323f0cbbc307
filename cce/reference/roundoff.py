"""Unit roundoffs of the dtypes, and the two constants of the rounding model of ``bounds``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cce.backends.problem import Problem
from cce.spec import Spec

#: Growth of n independent rounding errors, in ``LAMBDA sqrt(n) u``. Each has a standard deviation below 0.6 u, so 2 is
#: more than three standard deviations, and bounds the worst case for up to four terms.
LAMBDA = 2.0

#: Elementary operations in the computation of one value: exp and tanh to two units in the last place, a change of base,
#: a subtraction.
FEW = 4.0

_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Half the least subnormal: largest change of a value near zero when it is stored. Only that of fp16 matters.
_UNDERFLOW = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150, torch.float64: 0.0}


@dataclass(frozen=True)
class Roundoff:
    """The roundoffs of one problem.

    Attributes:
        u: roundoff of the accumulation: that of float64 for float64 inputs, else of float32. The oracle's own is added.
        dz: roundoff of dz, stored in the dtype of the products.
        dz_underflow: largest loss near zero of dz divided by the largest upstream gradient.
        map: roundoff of the maps' dtype, in which a tile's mass is kept for the backward.
        map_underflow: largest loss of a mass near zero.
        product: roundoff of a product's inputs, 0 if they are exact.
        de, dc: roundoffs of these gradients' dtypes.
        de_underflow, dc_underflow: their largest losses near zero.
    """

    u: float
    dz: float
    dz_underflow: float
    map: float
    map_underflow: float
    product: float
    de: float
    dc: float
    de_underflow: float
    dc_underflow: float

    @classmethod
    def of(cls, problem: Problem, spec: Spec, product: float = 0.0) -> Roundoff:
        accumulation = torch.float64 if problem.dtype == torch.float64 else torch.float32
        return cls(
            u=_UNIT[accumulation] + _UNIT[torch.float64],
            dz=_UNIT[problem.dtype],
            dz_underflow=_UNDERFLOW[problem.dtype],
            map=_UNIT[problem.map_dtype(spec)],
            map_underflow=_UNDERFLOW[problem.map_dtype(spec)],
            product=product,
            de=_UNIT[problem.e_dtype],
            dc=_UNIT[problem.c_dtype],
            de_underflow=_UNDERFLOW[problem.e_dtype],
            dc_underflow=_UNDERFLOW[problem.c_dtype],
        )
