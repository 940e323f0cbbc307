"""Unit roundoffs of the dtypes, and the two constants of the rounding model of ``bounds``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cce.backends.problem import Problem
from cce.spec import Spec

#: Growth of n independent rounding errors, in ``LAMBDA sqrt(n) u``. Each has a standard deviation below 0.6 u, so
#: 2 is over three of theirs, and a bound of the worst case for up to four terms.
LAMBDA = 2.0

#: Elementary operations on the way of one value: exp and tanh to two units in the last place, a change of base,
#: a subtraction.
FEW = 4.0

_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Half the least subnormal: how far a value near zero may move when it is stored. Only fp16's matters.
_UNDERFLOW = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150, torch.float64: 0.0}


@dataclass(frozen=True)
class Roundoff:
    """The roundoffs of one problem.

    Attributes:
        u: of the accumulation: float64's for float64 inputs, else float32's. The oracle's own is added.
        dz: of dz, stored in the dtype of the products.
        dz_underflow: what dz, divided by the largest upstream gradient, may lose near zero.
        map: of the maps' dtype, in which a tile's mass waits for the backward.
        map_underflow: what a mass may lose near zero.
        product: of a product's inputs, 0 if they are exact.
        de, dc: of these gradients' dtypes.
        de_underflow, dc_underflow: what they may lose near zero.
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
