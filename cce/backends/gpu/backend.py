"""A backend whose kernels are all it brings; everything else is here."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from cce.backends.base import Backend
from cce.backends.gpu.exact import exact
from cce.backends.gpu.filtered import filtered
from cce.backends.gpu.forward import forward
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.refusals import common_refusals
from cce.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.rows import used_rows
from cce.spec import Spec
from cce.worklist import WorkList, work_list


class KernelBackend(Backend):
    """The algorithm of docs/algorithm.md around some :class:`Kernels`, on their device."""

    device = "cuda"
    skips_ignored_rows = True

    @abstractmethod
    def kernels(self) -> Kernels:
        """The kernels, the same at every call. To make them, and to ask what they support, takes metadata alone."""

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        reasons = common_refusals(problem, spec)
        try:
            kernels = self.kernels()
        except ModuleNotFoundError:  # that a package is not there, `unavailable` tells
            return reasons
        return [*reasons, *kernels.unsupported(problem, spec)]

    def forward(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
        with torch.cuda.device_of(inputs.e):
            return forward(self.kernels(), inputs, problem, spec, maps)

    def backward(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Gradients[Tensor]:
        with torch.cuda.device_of(inputs.e):
            if spec.filter == "none":
                return exact(self.kernels(), inputs, problem, spec, outputs, upstream)
            return filtered(self.kernels(), inputs, problem, spec, outputs, maps, upstream)

    def work_list(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor], upstream: Upstream[Tensor]
    ) -> WorkList:
        return work_list(inputs, problem, spec, maps, upstream, used_rows(inputs))
