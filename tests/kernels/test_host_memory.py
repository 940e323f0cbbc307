"""The host code of the GPU backends keeps within ``Spec.scratch_bytes`` where it copies operands, window by window.

Kernels that do nothing take no memory. float32, whose products are the library's own on a CPU too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from doubles import IdleKernels
from meter import peak_of, size_of

from cce.backends.gpu.arrays import Sizes
from cce.backends.gpu.kernels import Kernels
from cce.backends.problem import Maps, Outputs, Problem
from cce.backends.resolve import resolve
from cce.spec import Spec
from cce.testing import Case
from cce.testing.data import make_inputs, make_problem, make_upstream
from cce.testing.kernels.plain_backend import PlainBackend

pytestmark = pytest.mark.usefixtures("one_thread")
MIB = 2**20


class Narrow(IdleKernels):
    def sizes(self, problem: Problem, spec: Spec) -> Sizes:
        return Sizes(32, 128, 32, 128, 2, 4)


class Idle(PlainBackend):
    def kernels(self) -> Kernels:
        return Narrow()


FILTER = {"filter": "element", "threshold": 2.0**-9, "block_n": 32, "block_v": 32}
CASES: dict[str, dict[str, Any]] = {
    "aligned": {},
    "odd-d": {"d": 61},  # all of c is copied
    "strided": {"strided": True},
    "prediction-order": {"outputs": ("prediction",), "vocab_order": True},
    "mean-logit": {"outputs": ("weighted_logit",), "logit_weight": True},
    "rows-left-out": {"m": 700},
    "filtered": {"spec": FILTER},
    "filtered-order": {"spec": FILTER, "vocab_order": True},
    "filtered-softcap-entropy": {"spec": FILTER, "softcap": 5.0, "outputs": ("entropy",)},
    "filtered-mean-logit": {"spec": FILTER, "outputs": ("weighted_logit",), "vocab_order": True},
}


@pytest.mark.parametrize("scratch_bytes", [MIB, 3 * MIB], ids=["1MiB", "3MiB"])
@pytest.mark.parametrize("name", CASES)
def test_peak(name: str, scratch_bytes: int) -> None:
    case = replace(Case(name, n=300, d=64, v=8000), **CASES[name])
    case = replace(case, wanted=("e", "c"), spec={**case.spec, "scratch_bytes": scratch_bytes})
    backend, problem = Idle(), make_problem(case, "cpu")
    spec = resolve(case.make_spec(), problem)
    assert not backend.unsupported(problem, spec)
    inputs, upstream = make_inputs(case, "cpu"), make_upstream(case, "cpu", torch.float32)
    maps = Maps(**{key: torch.zeros(spec.tiles(problem.v), problem.n) for key in problem.maps(spec)})
    row = torch.zeros(problem.n)
    given = Outputs(row, row[:, None], entropy=row if "entropy" in case.outputs else None)
    _, forward = peak_of(lambda: backend.forward(inputs, problem, spec, maps))
    gradients, backward = peak_of(lambda: backend.backward(inputs, problem, spec, given, maps, upstream))
    # Beside the results: a vector or ten of each, a copy of e if it has to be, and what a filter has of its own: the
    # statistics of the map's tiles, two bytes a row and tile, the plan; the mass of dead tiles times e.
    held = 10 * 8 * (problem.n * (1 + problem.k) + problem.v) + 2 * inputs.e.nbytes
    blocks = spec.tiles(problem.v) if maps.tile_mass is not None else 0
    tiles = problem.n * blocks
    sizes = {
        "forward": forward - held - 4 * tiles * (3 if "entropy" in case.outputs else 2),
        "backward": backward - held - 2 * tiles - size_of(gradients) - 8 * problem.d * blocks,
    }
    over = {key: f"{size / scratch_bytes:.2f} of the budget" for key, size in sizes.items() if size > scratch_bytes}
    assert not over
