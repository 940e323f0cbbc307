"""The `triton` backend as the registry sees it; Triton itself is imported when a kernel is first needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from cce.backends.base import Backend, OnePass
from cce.backends.gpu import onepass
from cce.backends.gpu.refusals import common_refusals, missing_gpu
from cce.backends.gpu.sizes import MOST_WEIGHED
from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.targets import mean_weights
from cce.backends.shared.worklist import WorkList
from cce.spec import Spec


class TritonBackend(Backend, OnePass):
    """Backend for every option in bfloat16, float16 and float32, on CUDA GPUs of compute capability 8.0 and above."""

    name = "triton"
    device = "cuda"
    skips_ignored_rows = True

    def unavailable(self, device: str) -> list[str]:
        reasons = []
        if find_spec("triton") is None:
            reasons.append("package 'triton' is not installed: pip install 'cce-kernels[triton]'")
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return reasons
        return reasons + missing_gpu(device, "not tried yet", " (or interpreted, with TRITON_INTERPRET=1)")

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        return common_refusals(problem, spec)

    def note(self, problem: Problem, spec: Spec) -> str:
        from cce.backends.triton.call import gpu_of
        from cce.backends.triton.choice import choose

        device = torch.device("cuda", torch.cuda.current_device()) if problem.device == "cuda" else torch.device("cpu")
        ordered = spec.permutation is not None or spec.vocab_order == "mean_logit"
        launch = choose(problem, Spec.from_key(spec.key), gpu_of(device), ordered)
        if launch.tuned:
            return "launch configuration: tuned for this problem on this GPU"
        return f"launch configuration: shipped, {'' if launch.measured else 'not '}measured on this architecture"

    def one_pass(self, problem: Problem, spec: Spec) -> OnePass | None:
        return self if onepass.serves(problem, spec) else None

    def loss_and_gradients(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
    ) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
        return _kernels().loss_and_gradients(inputs, problem, spec, weights)

    def prepare(
        self, targets: Tensor, v: int, ignore_index: int, mean: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        weighs = mean == torch.float32 and targets.numel() <= MOST_WEIGHED
        found: tuple[Tensor, Tensor | None] = _kernels().prepare(targets, v, ignore_index, weighs)
        if mean is None or weighs:
            return found
        return found[0], mean_weights(found[0], mean)

    def value(self, outputs: Outputs[Tensor], weights: Tensor) -> Tensor:
        found: Tensor = _kernels().value(outputs, weights)
        return found

    def scale(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        _kernels().scale(gradients, factor)

    def forward(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
        return _kernels().forward(inputs, problem, spec, maps)

    def backward(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Gradients[Tensor]:
        return _kernels().backward(inputs, problem, spec, outputs, maps, upstream)

    def work_list(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor], upstream: Upstream[Tensor]
    ) -> WorkList:
        return _kernels().work_list(inputs, problem, spec, maps, upstream)


@cache
def _kernels() -> ModuleType:
    from cce.backends.triton import run

    return run
