"""Base class of a backend that supplies only its kernels; everything else is here."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cce.backends.base import Backend, OnePass, asks_one_pass
from cce.backends.gpu import one_pass
from cce.backends.gpu.exact import exact
from cce.backends.gpu.filtered import filtered
from cce.backends.gpu.forward import forward
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.gpu.refusals import common_refusals
from cce.backends.gpu.sizes import MOST_WEIGHED
from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.rows import used_rows
from cce.backends.shared.targets import mean_weights
from cce.backends.shared.worklist import WorkList, work_list
from cce.spec import Spec
from cce.torch_private import current_device

#: Matrices, whose strides kernels take, or which are copied in pieces where they are not aligned (operands.py).
_MATRICES = ("e", "c")
_HERE: AbstractContextManager[Any] = nullcontext()
Fields = TypeVar("Fields", Inputs[Tensor], Outputs[Tensor], Upstream[Tensor])


class KernelBackend(Backend, OnePass):
    """The algorithm of docs/algorithm.md around some :class:`Kernels`, on their device."""

    device = "cuda"
    skips_ignored_rows = True

    @abstractmethod
    def kernels(self) -> Kernels:
        """The kernels, the same object at every call. Making them and asking what they support needs metadata alone."""

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        reasons = common_refusals(problem, spec)
        try:
            kernels = self.kernels()
        except ModuleNotFoundError:  # `unavailable` reports the missing package
            return reasons
        return [*reasons, *kernels.unsupported(problem, spec)]

    def one_pass(self, problem: Problem, spec: Spec) -> OnePass | None:
        return self if one_pass.serves(problem, spec) and self.kernels().one_pass() is not None else None

    @property
    def _one_pass(self) -> OnePassKernels:
        found = self.kernels().one_pass()
        assert found is not None
        return found

    def note(self, problem: Problem, spec: Spec) -> str:
        if not asks_one_pass(problem) or self.one_pass(problem, spec) is None:
            return ""
        return one_pass.described(problem, spec)

    def loss_and_gradients(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
    ) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
        with on_device_of(inputs.e):
            given = contiguous(inputs), problem, spec, weights.contiguous()
            return one_pass.loss_and_gradients(self._one_pass, *given)

    def prepare(
        self, targets: Tensor, v: int, ignore_index: int, mean: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        kernels = self.kernels().one_pass()
        if kernels is None:
            return super().prepare(targets, v, ignore_index, mean)
        weighs = mean == torch.float32 and targets.numel() <= MOST_WEIGHED
        with on_device_of(targets):
            found, weights = one_pass.prepared(kernels, targets.contiguous(), v, ignore_index, weighs)
        return found, weights if mean is None or weighs else mean_weights(found, mean)

    def value(self, outputs: Outputs[Tensor], weights: Tensor) -> Tensor:
        with on_device_of(weights):
            return one_pass.value(self._one_pass, contiguous(outputs), weights.contiguous())

    def scale(self, gradients: Gradients[Tensor], factor: Tensor, targets: Tensor | None) -> None:
        assert targets is not None
        with on_device_of(factor):
            one_pass.multiply(self._one_pass, gradients, factor, targets.contiguous())

    def forward(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
        with on_device_of(inputs.e):
            return forward(self.kernels(), contiguous(inputs), problem, spec, maps)

    def backward(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Gradients[Tensor]:
        inputs, outputs, upstream = contiguous(inputs), contiguous(outputs), contiguous(upstream)
        with on_device_of(inputs.e):
            if spec.filter == "none":
                return exact(self.kernels(), inputs, problem, spec, outputs, upstream)
            return filtered(self.kernels(), inputs, problem, spec, outputs, maps, upstream)

    def work_list(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor], upstream: Upstream[Tensor]
    ) -> WorkList:
        return work_list(inputs, problem, spec, maps, upstream, used_rows(inputs))


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which the device of ``x`` is current, for kernel launches. Most often it is already."""
    if not x.is_cuda or x.get_device() == current_device():
        return _HERE
    return torch.cuda.device_of(x)


def contiguous(fields: Fields) -> Fields:
    """Return the fields with every vector and (N, K) table contiguous: a column, or one expanded number, is copied.

    Kernels take pointers to them without strides, and this is the one place that makes them fit.
    """
    copies = {
        name: x.contiguous()
        for name, x in vars(fields).items()
        if x is not None and name not in _MATRICES and not x.is_contiguous()
    }
    return replace(fields, **copies) if copies else fields
