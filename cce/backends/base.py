"""What a backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.worklist import WorkList, work_list
from cce.spec import Spec


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

    def one_pass(self, problem: Problem, spec: Spec) -> bool:
        """Whether :meth:`loss_and_gradients` is there for this problem and is the better way; from metadata alone.

        Asked by the front end for means and sums of the plain loss, when a gradient is wanted.
        """
        return False

    def loss_and_gradients(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
    ) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
        """Outputs, and the gradients of ``sum_ik weights_ik (lse_i - z[i, targets_ik])``, in one pass over the logits.

        ``weights`` is (N, K), in the accumulation dtype; those of targets -1 are 0, or NaN in a mean over nothing, and
        do not count. dE of rows without a target may be anything: the front end makes it 0. Only where
        :meth:`one_pass` says so.
        """
        raise NotImplementedError(f"backend {self.name!r} has no pass that computes gradients along with the loss")

    def mean_weights(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, K) the weights of :meth:`loss_and_gradients` in a mean: 1 / their number for targets, 0 for none."""
        in_use = targets >= 0
        return in_use / in_use.sum(dtype=dtype)

    def prepared(self, targets: Tensor, v: int, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor | None] | None:
        """What the front end makes of ordinary targets before :meth:`loss_and_gradients`, where kernels can do better.

        Args:
            targets: (...) integers; another than those in [0, v) and ``ignore_index`` is a device-side assertion.
            mean: their weights in a mean are wanted, too.

        Returns:
            None: the front end does it, with operations of the library. Or (N, 1) int64, with -1 for ``ignore_index``,
            and (N, 1) float32 as :meth:`mean_weights` has it, or None.
        """
        return None

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
