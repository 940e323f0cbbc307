"""The kernels a GPU backend supplies: the contract between the host code of this package and CuPy's or Numba's kernels.

The host code owns the order of the algorithm's steps, the memory, the plan of a filtered backward, and every product
that torch computes as well as a kernel would (dense dE and dC). Kernels work on tiles. Their conventions:

- Matrices ``e`` and ``c`` are *aligned*: unit stride along D, base address and row pitch multiples of 16 bytes, D
  padded with zeros to a multiple of 16 bytes, both in the products' dtype (bfloat16, float16 or float32). Row pitch and
  number of rows are arbitrary; offsets need 64 bits.
- Sums are float32. float32 operands are multiplied as tf32, or in IEEE float32 if ``ieee`` is set.
- A *place* is a column's position in the vocabulary order; the entry there is ``order[place]``, or the place itself
  where there is no order.
- Nothing beyond a given shape is read or written. Launches go to torch's current stream; nothing waits for the GPU.
- The same arguments give the same bits: every sum runs in an order fixed by the problem. An atomic addition to a result
  is in order only where one block of threads alone adds to the element, one addition after the other.
- Rows that do not count may hold NaN or inf in ``e``: what is computed for them is unspecified and must not leak into
  other rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from cce.backends.gpu.arrays import Dense, Formula, GradientOfWindow, Live, Sizes, Window
from cce.backends.gpu.library import LibraryOperations
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.problem import Problem
from cce.spec import Spec


class Kernels(LibraryOperations, ABC):
    """Kernels a backend implements; ``problem`` and the resolved ``spec`` are those of the call.

    Attributes:
        any_layout: whether ``e`` may have any strides, and ``c`` any strides and any of the three dtypes, in every
            kernel. The host then copies neither to align it.
        rows_in_scratch: largest share of the scratch memory that a filtered backward gives to a copy of the rows of
            ``e``, before it uses the memory of dE. What the copy takes, live tiles cannot.
    """

    any_layout = False
    rows_in_scratch = 2 / 3

    @abstractmethod
    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        """Reasons why there is no kernel for the problem, from metadata alone."""

    @abstractmethod
    def sizes(self, problem: Problem, spec: Spec) -> Sizes:
        """Tile sizes the problem would use on the current device."""

    def one_pass(self) -> OnePassKernels | None:
        """Kernels of a pass that computes gradients along with the loss; None if the backend has no such pass."""
        return None

    @abstractmethod
    def target_logits(self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor) -> None:
        """Write out (N, K) float32: z[i, targets[i, k]], 0 where the target is -1.

        This kernel alone takes ``e`` (N, D) and ``c`` (V, D) as they are: any strides, any of the three dtypes each.
        ``targets`` are (N, K) int64, contiguous; a bias is (V,) float32.
        """

    @abstractmethod
    def statistics(self, problem: Problem, spec: Spec, window: Window) -> None:
        """Compute the statistics of a window of the vocabulary.

        With ``spec.lse_accumulation`` "online", a block's sums are relative to the running maximum of the split; with
        "tile", to the block's own.
        """

    @abstractmethod
    def gradient(self, problem: Problem, spec: Spec, dense: Dense) -> GradientOfWindow:
        """Make the function that computes dx of all rows and a window of the vocabulary.

        It is called for window after window, so slow host work belongs here, where it is done once. Its arguments:

        - c: (C, D) aligned, the rows of ``c`` from ``first`` on.
        - first: any number. Places are entries.
        - dz: (N, C) in the products' dtype, unit stride along C, aligned. Columns from C to the next multiple of 16
          bytes may be written.
        - column_sums: (blocks of ``gradient_rows`` rows, C) float32 or None: sums over the block's rows of dx before
          rounding.
        """

    @abstractmethod
    def live(self, problem: Problem, spec: Spec, live: Live) -> Callable[[int], None]:
        """Make the function that does all work of the chunk of a given number: dx into its slots, then de, dc, dbias.

        It is called for every chunk of the plan, in ascending order; most find nothing to do. Slow host work belongs
        here, where it is done once.
        """
