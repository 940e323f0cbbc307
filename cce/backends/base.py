"""The interface of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
        """Compute the outputs and the gradients of ``sum_ik weights_ik (lse_i - z[i, targets_ik])``.

        ``weights`` is (N, K), in the accumulation dtype. The weights of targets -1 are 0, or NaN in a mean over
        nothing, and must be ignored. dE may hold anything in rows without a target: :meth:`scale` sets them to 0.
        """

    def value(self, outputs: Outputs[Tensor], weights: Tensor) -> Tensor:
        """Return the scalar ``sum_ik weights_ik nll_ik`` from the outputs of :meth:`loss_and_gradients`."""
        return (weights * outputs.nll).sum()

    def scale(self, gradients: Gradients[Tensor], factor: Tensor, targets: Tensor | None) -> None:
        """Multiply the gradients of :meth:`loss_and_gradients` in place by ``factor``, a tensor with one element.

        As in PyTorch, dE becomes 0 in rows without a target, whatever it holds, and where no row has one, a factor that
        is NaN or infinite leaves dC and dbias at 0.

        The factor is 1 when the loss itself is differentiated. The host cannot read it from a GPU without a
        synchronisation; a GPU backend can skip the pass over the gradients in a kernel that tests the factor first.

        Args:
            targets: (N, K), -1 for none; None where dE is 0 in rows without a target and the factor is finite.
        """
        ignored = None if targets is None else (targets < 0).all(1, keepdim=True)
        if ignored is not None:
            factor = factor.masked_fill(ignored.all(), 0)
        if factor.device.type != "cpu" or factor != 1:
            for gradient in (gradients.de, gradients.dc, gradients.dbias):
                if gradient is not None:
                    gradient.mul_(factor)
        if ignored is not None and gradients.de is not None and gradients.de.numel():
            gradients.de.masked_fill_(ignored, 0)


def asks_one_pass(problem: Problem) -> bool:
    """Whether a backend is asked for its pass that computes gradients along with the loss."""
    # In float16, gradients of a mean underflow before a GradScaler's factor is known, which only backward brings.
    half = torch.float16 in (problem.e_dtype, problem.c_dtype)
    plain = not problem.outputs and not problem.part
    return problem.needs_grad and plain and problem.n > 0 and problem.v > 0 and not half


class Backend(ABC):
    """One implementation of the algorithm of docs/algorithm.md.

    The front end has already checked every argument, flattened batch dimensions, applied ``shift`` and
    dropped ignored rows; reductions, class weights and token weights come after. A backend sees N >= 1
    rows, a *resolved* spec, and tensors on one device.

    ``cce.testing.check_backend(name)`` tests a backend against the float64 reference.
    """

    name: str

    #: True if the backend accepts rows without a target (all -1) and spends nothing on them: their outputs are 0 (-1
    #: for the prediction), their gradients are 0, and ``e`` is not read there. The front end then never has to ask a
    #: GPU for the number of rows. If False, the backend only sees rows in use.
    skips_ignored_rows = False

    #: Device type the backend is made for. docs/options.md lists its answers for this device, whatever machine writes
    #: the page.
    device = "cpu"

    def unavailable(self, device: str) -> list[str]:
        """All reasons why nothing can run on this device type here: a missing package or missing hardware.

        Reasons are asked for once for each kind of call, these and those of :meth:`unsupported`: they must not change
        while the process lives.
        """
        return []

    @abstractmethod
    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        """All reasons why this problem cannot run in any environment, from metadata alone; empty if it can."""

    @abstractmethod
    def forward(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
        """Compute the outputs requested by ``problem.outputs``, and fill those of ``maps`` that are not None.

        The maps are (T, N) views owned by the caller, of dtype ``problem.map_dtype(spec)``; their row stride may exceed
        N.
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
        """Compute the gradients requested by ``problem``; every argument stays unchanged (a graph may be retained)."""

    def note(self, problem: Problem, spec: Spec) -> str:
        """One line for :func:`cce.explain` on how a problem would run here; empty if there is nothing to say."""
        return ""

    def prepare(
        self, targets: Tensor, v: int, ignore_index: int, mean: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """Bring the targets into the form the other methods take; overridden where kernels are faster than torch.

        The front end calls an override for tensors on a CUDA device. Elsewhere, and with CCE_CHECK_TARGETS=1, it calls
        this method, whose errors name the target.

        Args:
            targets: (N, K) integers on a device of this backend. A value that is neither in [0, v) nor ``ignore_index``
                is an error, on a GPU a device-side assertion (``shared/targets.py``).
            v: number of vocabulary entries.
            mean: dtype of the targets' weights in a mean, or None if the weights are not wanted; if given, K is 1.

        Returns:
            The targets, (N, K) int64 with -1 for ``ignore_index``; and the weights, (N, 1), 1 / (number of targets) for
            a target and 0 for -1, or None.
        """
        rows = prepare(targets, v, ignore_index)
        return rows, None if mean is None else mean_weights(rows, mean)

    def one_pass(self, problem: Problem, spec: Spec) -> OnePass | None:
        """Pass that computes gradients along with the loss, or None if this problem has none or it would not be faster.

        The front end asks, with metadata alone, for means and sums of the plain loss whose gradient is wanted.
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
