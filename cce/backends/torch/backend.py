"""The `torch` backend as the registry sees it."""

from __future__ import annotations

from torch import Tensor

from cce.backends.base import Backend, OnePass
from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.torch.backward import backward
from cce.backends.torch.forward import forward
from cce.backends.torch.one_pass import loss_and_gradients, rows_at_once
from cce.backends.torch.plan import minimum_scratch
from cce.spec import Spec


class TorchBackend(Backend, OnePass):
    """Backend for every option, every dtype and every device; the default where there is no GPU kernel."""

    name = "torch"

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        needed = minimum_scratch(problem, spec)
        if spec.scratch_bytes < needed:
            return [f"scratch_bytes={spec.scratch_bytes} is less than the {needed} bytes of one row and one tile"]
        return []

    def one_pass(self, problem: Problem, spec: Spec) -> OnePass | None:
        return self if rows_at_once(problem, spec) > 0 else None

    def loss_and_gradients(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
    ) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
        return loss_and_gradients(inputs, problem, spec, weights)

    def forward(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
        return forward(inputs, problem, spec, maps)

    def backward(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Gradients[Tensor]:
        return backward(inputs, problem, spec, outputs, maps, upstream)
