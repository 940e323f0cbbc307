"""What a backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.targets import mean_weights, prepare
from cce.backends.shared.worklist import WorkList, work_list
from cce.spec import Spec


class OnePass(ABC):
    """A pass over the logits that computes the gradients of a weighted sum of losses along with it."""

    @abstractmethod
    def loss_and_gradients(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
    ) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
        """Outputs, and the gradients of ``sum_ik weights_ik (lse_i - z[i, targets_ik])``.

        ``weights`` is (N, K), in the accumulation dtype; those of targets -1 are 0, or NaN in a mean over nothing, and
        do not count. dE of rows without a target may be anything: the front end makes it 0.
        """

    def value(self, outputs: Outputs[Tensor], weights: Tensor) -> Tensor:
        """``sum_ik weights_ik nll_ik`` of what :meth:`loss_and_gradients` found: a scalar."""
        return (weights * outputs.nll).sum()

    def scale(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        """Multiplies the gradients of :meth:`loss_and_gradients` in place by ``factor``, a tensor of one number.

        It is 1 where the loss is what was differentiated. The values of a GPU cannot be looked at without waiting for
        it: there a backend can save the pass over the gradients, in a kernel that looks first.
        """
        if factor.device.type == "cpu" and factor == 1:
            return
        for gradient in gradients:
            gradient.mul_(factor)


class Backend(ABC):
    """One implementation of the algorithm of docs/algorithm.md.

    The front end has already checked every argument, flattened batch dimensions, applied ``shift`` and
    dropped ignored rows; reductions, class weights and token weights come after. A backend sees N >= 1
    rows, a *resolved* spec, and tensors on one device.

    ``cce.testing.check_backend(name)`` holds it to the float64 reference.
    """

    name: str

    #: The backend takes the rows without a target, too, all -1, and spends nothing on them: their outputs are 0 (-1 for
    #: the prediction), their gradients 0, and what ``e`` holds there is not looked at. The front end then never has to
    #: ask a GPU how many rows there are. Without it, a backend sees rows in use only.
    skips_ignored_rows = False

    #: Device type it is made for: whose problems docs/options.md asks it about, whatever machine writes the page.
    device = "cpu"

    def unavailable(self, device: str) -> list[str]:
        """All reasons why nothing can run here on this device type: a package or hardware that is missing."""
        return []

    @abstractmethod
    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        """All reasons why this problem cannot run, wherever it is, from metadata alone; empty if it can."""

    @abstractmethod
    def forward(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
        """Computes the outputs ``problem.outputs`` asks for, and fills those of ``maps`` that are not None.

        The maps are (T, N) views the caller owns, of ``problem.map_dtype(spec)``; their rows may be longer than N.
        """

    @abstractmethod
    def backward(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Gradients[Tensor]:
        """Gradients ``problem`` asks for; must leave every argument unchanged (a graph may be retained)."""

    def note(self, problem: Problem, spec: Spec) -> str:
        """What a user may want to know of how a problem would run here, in a line, for :func:`cce.explain`."""
        return ""

    def prepare(
        self, targets: Tensor, v: int, ignore_index: int, mean: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """The targets as the other methods take them; overridden where kernels do it faster than the library.

        Args:
            targets: (N, K) integers on a device of this backend. One that is neither in [0, v) nor ``ignore_index`` is
                an error, on a GPU a device-side assertion (``shared/targets.py``).
            v: entries of the vocabulary.
            mean: dtype of their weights in a mean, if these are wanted, too; then K is 1.

        Returns:
            (N, K) int64, with -1 for ``ignore_index``, and (N, 1) 1 / their number for targets, 0 for none, or None.
        """
        rows = prepare(targets, v, ignore_index)
        return rows, None if mean is None else mean_weights(rows, mean)

    def one_pass(self, problem: Problem, spec: Spec) -> OnePass | None:
        """A pass that computes gradients along with the loss, if there is one for this problem and it is faster.

        Asked from metadata alone, by the front end, for means and sums of the plain loss whose gradient is wanted.
        """
        return None

    def work_list(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> WorkList:
        """The live tiles :meth:`backward` computes under a filter; overridden by a backend that finds its own."""
        return work_list(inputs, problem, spec, maps, upstream)
