"""Loss and gradients in one pass: all logits of a few rows at once, three products instead of four.

The exponentials of a block of rows stay in the scratch memory until the rows' log-sum-exp is known, and are then
scaled to the gradient in place. dC accumulates over the blocks of rows, in its own memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.problem import Gradients, Inputs, Outputs, Problem
from cce.backends.shared.pair import finite, joined, pair
from cce.backends.torch.arithmetic import Arithmetic, Rows
from cce.backends.torch.forward import Chunk, chunks
from cce.backends.torch.logits import add_at_, logits_
from cce.spec import Spec

# Rows of a block: with fewer, the products are short and dC is read and written too often to gain anything; with more,
# the memory for logits grows but the time does not fall (docs/performance-notes.md).
_MOST, _LEAST = 208, 128
_COLUMNS = 4096  # columns of a product


def rows_at_once(problem: Problem, spec: Spec) -> int:
    """Number of rows whose logits fit into ``spec.scratch_bytes``, in blocks of equal size; 0 if one pass does not pay.

    Measured on CPUs only. One pass needs a dC whose dtype can hold its own sum, and logits without a softcap: the
    derivative of a softcap would need the logits a second time.
    """
    arithmetic = Arithmetic.choose(problem, spec)
    wide = arithmetic.result
    plain = spec.filter == "none" and spec.permutation is None and problem.softcap is None and not problem.outputs
    if problem.device != "cpu" or problem.n == 0 or not plain or (problem.grad_c and problem.c_dtype != wide):
        return 0
    copies = problem.d * wide.itemsize  # bytes of a row of e, and of c
    fixed = _COLUMNS * (copies if problem.c_dtype != wide else 0)
    fit = (spec.scratch_bytes - fixed) // (problem.v * wide.itemsize + 2 * copies)
    blocks = -(-problem.n // max(1, min(_MOST, fit)))
    rows = -(-problem.n // blocks)
    return rows if min(problem.n, _LEAST) <= fit else 0


def loss_and_gradients(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
    """Outputs (lse and nll), and the gradients of ``sum_ik weights_ik (lse_i - z[i, targets_ik])``."""
    arithmetic, step = Arithmetic.choose(problem, spec), rows_at_once(problem, spec)
    run = _Run(inputs, problem, arithmetic, chunks(problem, spec, _columns(spec)), step)
    found = [run.block(n0, min(problem.n, n0 + step), weights) for n0 in range(0, problem.n, step)]
    outputs = Outputs(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return outputs, Gradients(run.de, run.dc, run.dbias)


def _columns(spec: Spec) -> int:
    assert spec.block_v is not None
    return max(1, _COLUMNS // spec.block_v) * spec.block_v


class _Run:
    """The sums, and the logits of the current block of rows."""

    def __init__(
        self, inputs: Inputs[Tensor], problem: Problem, arithmetic: Arithmetic, vocabulary: list[Chunk], step: int
    ) -> None:
        self.inputs, self.problem, self.arithmetic, self.vocabulary = inputs, problem, arithmetic, vocabulary
        self.rows = Rows(inputs, arithmetic, keep=False)
        wide = inputs.e.new_empty(0, dtype=arithmetic.result)
        self.buffer = wide.new_empty(min(step, problem.n) * problem.v)
        self.de = wide.new_empty(problem.n, problem.d) if problem.grad_e else None
        self.dc = wide.new_empty(problem.v, problem.d) if problem.grad_c else None
        self.dbias = wide.new_zeros(problem.v) if problem.grad_bias else None

    def block(self, n0: int, n1: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return lse (rows,) and nll (rows, K) of one block of rows; add its gradients to the sums."""
        e, targets = self.rows.block(n0, n1), self.inputs.targets[n0:n1]
        target_logits = e.new_zeros(targets.shape, dtype=self.arithmetic.result)
        pieces, m, s = [], [], []
        for chunk in self.vocabulary:
            z = logits_(self.problem, self.arithmetic, e, *self._operands(chunk), self._piece(chunk, len(e)))
            row, k = _inside(chunk, targets)
            target_logits[row, k] = z[row, targets[row, k] - chunk.v0]
            m.append(z.amax(1, keepdim=True))
            s.append(z.sub_(finite(m[-1])).exp_().sum(1, keepdim=True))  # a chunk may be masked: avoid -inf + inf
            pieces.append(z)
        maxima, sums = torch.cat(m, 1), torch.cat(s, 1)  # (rows, chunks)
        row_m, log_s = joined(maxima, sums.log(), 1)
        lse, lse_low = pair(row_m, log_s)
        nll = (log_s[:, None] + (row_m[:, None] - target_logits)).clamp_(min=0).masked_fill_(targets < 0, 0)
        # p = exp(z - m) exp(m - lse); dx = logit_scale (sum_k w_k p - w_k at target k)
        w = weights[n0:n1] * self.problem.logit_scale
        factors = ((maxima - lse[:, None]) - lse_low[:, None]).exp_().mul_(w.sum(1, keepdim=True))
        for index, (chunk, z) in enumerate(zip(self.vocabulary, pieces, strict=True)):
            dx = z.mul_(factors[:, index, None])
            row, k = _inside(chunk, targets)
            add_at_(dx.view(-1), row * dx.shape[1] + targets[row, k] - chunk.v0, -w[row, k])
            self._products(chunk, dx, e, n0, n1)
        return lse, nll

    def _piece(self, chunk: Chunk, rows: int) -> Tensor:
        """Memory for the logits of ``chunk``, (rows, columns)."""
        return self.buffer[rows * chunk.v0 : rows * chunk.v1].view(rows, chunk.v1 - chunk.v0)

    def _operands(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        c = self.arithmetic.columns(self.inputs, chunk.v0, chunk.v1)
        return c, self.arithmetic.bias(self.inputs, chunk.v0, chunk.v1)

    def _products(self, chunk: Chunk, dx: Tensor, e: Tensor, n0: int, n1: int) -> None:
        """Compute dE of the rows += dx c, dC of the chunk += dx^T e, and dbias += column sums."""
        if self.de is not None:
            c = self.arithmetic.columns(self.inputs, chunk.v0, chunk.v1)
            _add_product(dx, c, self.de[n0:n1], first=chunk.v0 == 0)
        if self.dc is not None:
            _add_product(dx.T, e, self.dc[chunk.v0 : chunk.v1], first=n0 == 0)
        if self.dbias is not None:
            self.dbias[chunk.v0 : chunk.v1] += dx.sum(0)


def _add_product(a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
    if first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def _inside(chunk: Chunk, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Row and k of each target in ``chunk``."""
    row, k = ((targets >= chunk.v0) & (targets < chunk.v1)).nonzero(as_tuple=True)
    return row, k
