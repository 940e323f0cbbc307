"""Matrix products with a wide accumulator, by the means each device offers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.problem import Inputs, Problem
from cce.spec import Spec

_WIDE = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Arithmetic:
    """Dtypes of the products: both factors in ``operand``, the sum in ``result``.

    CUDA multiplies 16-bit factors into a float32 result. Elsewhere torch's 16-bit product rounds its result to 16 bits,
    which would ruin the accuracy of the log-sum-exp (and on CPUs without 16-bit instructions it is tens of times
    slower): there a piece of the factors is widened before each product.
    """

    operand: torch.dtype
    result: torch.dtype

    @classmethod
    def choose(cls, problem: Problem, spec: Spec) -> Arithmetic:
        result = torch.promote_types(_WIDE[str(spec.accumulate)], problem.dtype)
        half = problem.dtype in (torch.bfloat16, torch.float16)
        native = problem.device == "cuda" and torch.version.hip is None and result == torch.float32
        return cls(problem.dtype if half and native else result, result)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """Write out = a b."""
        if self.operand == self.result:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=self.result, out=out)

    def add_product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """Compute out += a b."""
        if self.operand == self.result:
            return out.addmm_(a, b)
        return torch.addmm(out, a, b, out_dtype=self.result, out=out)

    def columns(self, inputs: Inputs[Tensor], v0: int, v1: int) -> Tensor:
        """Rows of ``c`` of one vocabulary chunk, (v1 - v0, D); a view where no copy is needed."""
        return along_vocabulary(inputs, inputs.c, v0, v1).to(self.operand)

    def bias(self, inputs: Inputs[Tensor], v0: int, v1: int) -> Tensor | None:
        if inputs.bias is None:
            return None
        return along_vocabulary(inputs, inputs.bias, v0, v1).to(self.result)


def along_vocabulary(inputs: Inputs[Tensor], x: Tensor, v0: int, v1: int) -> Tensor:
    """Places v0 to v1 of ``x`` (V, ...) in the vocabulary order."""
    if inputs.vocab_order is None:
        return x[v0:v1]
    return x.index_select(0, inputs.vocab_order[v0:v1])


def gathered(inputs: Inputs[Tensor]) -> bool:
    """Whether operands have to be gathered: rows of ``e`` are left out, or the vocabulary has its own order."""
    return inputs.rows is not None or inputs.vocab_order is not None


class Rows:
    """The rows of ``e`` a problem uses, in the products' dtype.

    They are copied at most once, and only if the copy is small compared with the scratch budget; otherwise each piece
    is gathered and widened when it is requested.
    """

    def __init__(self, inputs: Inputs[Tensor], arithmetic: Arithmetic, keep: bool) -> None:
        self._e, self._rows, self._dtype = inputs.e, inputs.rows, arithmetic.operand
        if keep and (self._rows is not None or self._e.dtype != self._dtype):
            self._e, self._rows = self.block(0, len(inputs.targets)), None

    def block(self, n0: int, n1: int) -> Tensor:
        """Rows n0 to n1 of the problem, (n1 - n0, D)."""
        if self._rows is None:
            return self._e[n0:n1].to(self._dtype)
        return self._e.index_select(0, self._rows[n0:n1]).to(self._dtype)

    def gather(self, index: Tensor) -> Tensor:
        """Rows ``index`` of the problem, (len(index), D)."""
        index = index if self._rows is None else self._rows.index_select(0, index)
        return self._e.index_select(0, index).to(self._dtype)
