"""The `reference` backend: the float64 NumPy execution of the spec, behind the same interface as the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cce.backends.base import Backend
from cce.backends.problem import LEAST_HIT, Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.reference import tiled
from cce.reference.worklist import filter_hits
from cce.spec import Spec

Fields = TypeVar("Fields", Inputs[Any], Outputs[Any], Upstream[Any], Gradients[Any])


class ReferenceBackend(Backend):
    """The oracle, for comparisons and for reading: CPU tensors only, and slow."""

    name = "reference"

    def unavailable(self, device: str) -> list[str]:
        return [] if device == "cpu" else [f"runs in NumPy on CPU tensors, not on {device!r}"]

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        return []

    def forward(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
        outputs, found = tiled.forward(to_numpy(inputs), problem, spec)
        if maps.tile_mass is not None:
            assert outputs.lse_low is not None
            mass = np.exp(found.log_mass(outputs.lse, outputs.lse_low))
            hit = filter_hits(spec, outputs, found)
            maps.tile_mass.copy_(torch.from_numpy(np.where(hit, -np.maximum(mass, LEAST_HIT), mass)))
        if maps.tile_entropy is not None:
            maps.tile_entropy.copy_(torch.from_numpy(found.tile_entropy))
        return to_torch(rounded_pair(outputs, spec))

    def backward(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Gradients[Tensor]:
        # The maps that passed through the graph are rounded; the oracle computes its own again.
        arrays = to_numpy(inputs)
        found, own = tiled.forward(arrays, problem, spec)
        if problem.part:  # the oracle's own outputs cover only a part of the vocabulary
            whole = to_numpy(outputs)
            found = replace(found, lse=whole.lse, lse_low=whole.lse_low, entropy=whole.entropy)
        return to_torch(tiled.backward(arrays, problem, spec, found, own, to_numpy(upstream)))


def rounded_pair(outputs: Outputs[np.ndarray], spec: Spec) -> Outputs[np.ndarray]:
    """Outputs with lse rounded as the front end will hold it, and the rounding error in lse_low."""
    assert outputs.lse_low is not None
    lse = outputs.lse.astype(str(spec.accumulate)).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return replace(outputs, lse=lse, lse_low=(outputs.lse - lse) + outputs.lse_low)


def to_numpy(fields: Fields) -> Fields:
    """Return the dataclass with float64 and int64 arrays in place of tensors."""
    return type(fields)(**{name: None if x is None else as_array(x) for name, x in vars(fields).items()})


def to_torch(fields: Fields) -> Fields:
    """Return the dataclass with tensors in place of arrays."""
    return type(fields)(
        **{name: None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for name, x in vars(fields).items()}
    )


def as_array(x: Tensor) -> np.ndarray:
    """Copy a tensor to a float64 (or int64) array on the host."""
    x = x.detach().cpu()
    return x.to(torch.float64).numpy() if x.is_floating_point() else x.to(torch.int64).numpy()
