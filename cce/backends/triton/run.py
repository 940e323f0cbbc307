"""Entry points to the kernels: the device, the layout of what they read, the interpreter, and which backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cce.backends.gpu.device import on_device_of
from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.worklist import WorkList
from cce.backends.triton.call import INTERPRETED, Call
from cce.backends.triton.exact import exact
from cce.backends.triton.filtered import filtered, live_tiles
from cce.backends.triton.forward import forward as launch_forward
from cce.backends.triton.layouts import packed
from cce.backends.triton.onepass import loss_and_gradients as launch_one_pass
from cce.backends.triton.onepass import multiply
from cce.backends.triton.onepass import value as launch_value
from cce.backends.triton.targets import prepare_mean, prepare_targets
from cce.spec import Spec

if INTERPRETED:
    from cce.backends.triton.triton_private import correct_bfloat16

    correct_bfloat16()


def forward(inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
    """Implement :meth:`cce.backends.base.Backend.forward`; kernels are launched on the device of the arguments."""
    with on_device_of(inputs.e):
        return launch_forward(packed(inputs), problem, spec, maps)


def loss_and_gradients(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
    """Implement :meth:`cce.backends.base.OnePass.loss_and_gradients`."""
    with on_device_of(inputs.e):
        return launch_one_pass(packed(inputs), problem, spec, weights.contiguous())


def prepare(targets: Tensor, v: int, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor | None]:
    """Implement :meth:`cce.backends.base.Backend.prepare`; the weights in a ``mean`` are float32."""
    with on_device_of(targets):
        return prepare_mean(targets, v, ignore_index) if mean else (prepare_targets(targets, v, ignore_index), None)


def value(outputs: Outputs[Tensor], weights: Tensor) -> Tensor:
    """Implement :meth:`cce.backends.base.OnePass.value`."""
    with on_device_of(weights):
        return launch_value(packed(outputs), weights.contiguous())


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Implement :meth:`cce.backends.base.OnePass.scale`."""
    with on_device_of(factor):
        multiply(gradients, factor)


def backward(
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Tensor],
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
) -> Gradients[Tensor]:
    """Implement :meth:`cce.backends.base.Backend.backward`."""
    inputs, outputs, upstream = packed(inputs), packed(outputs), packed(upstream)
    with on_device_of(inputs.e):
        if spec.filter == "none":
            return exact(inputs, problem, spec, outputs, upstream)
        return filtered(Call.of(inputs, problem, spec), inputs, outputs, maps, upstream)


def work_list(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor], upstream: Upstream[Tensor]
) -> WorkList:
    """Implement :meth:`cce.backends.base.Backend.work_list`."""
    inputs, upstream = packed(inputs), packed(upstream)
    with on_device_of(inputs.e):
        return live_tiles(Call.of(inputs, problem, spec), inputs, maps, upstream)
