"""The torch backend holds no more temporary memory than ``Spec.scratch_bytes``.

What is not temporary is taken off the peak: the results and the tile maps, the float32 sum behind a 16-bit dE, the work
list's one byte a row and tile, and a few vectors of one number a target.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from meter import peak_of, size_of
from torch import Tensor

from cce.backends.problem import Maps, Problem, Upstream
from cce.backends.resolve import resolve
from cce.backends.torch import TorchBackend
from cce.backends.torch.plan import minimum_scratch
from cce.spec import Spec
from cce.testing import Case
from cce.testing.data import make_inputs, make_problem, make_upstream

pytestmark = pytest.mark.usefixtures("one_thread")
MIB = 2**20


def vectors(problem: Problem) -> int:
    """Bytes of ten vectors of 8-byte numbers, one number a row and target entry."""
    return 10 * 8 * problem.n * (1 + problem.k)


def work_list(problem: Problem, spec: Spec) -> int:
    return 0 if spec.filter == "none" else problem.n * spec.tiles(problem.v)


def test_the_meter_sees_temporaries() -> None:
    """Of an expression, and inside an operator: 1 MB each; a view is none."""
    x = torch.zeros(250_000)
    assert peak_of(lambda: x.view(-1, 10)[:, :3])[1] == 0
    assert 0 <= peak_of(lambda: x + 1)[1] - x.nbytes < 100  # the 1 is a tensor too
    assert peak_of(lambda: ((x + 1) * 2).sum())[1] >= 2 * x.nbytes
    result, peak = peak_of(lambda: x.view(1000, 250).logsumexp(1))
    assert peak >= x.nbytes > 100 * result.nbytes


def every_row_counts(upstream: Upstream[Tensor]) -> Upstream[Tensor]:
    """No gradient is 0: as much to compute as there can be."""
    return Upstream(**{name: None if x is None else torch.where(x == 0, 1, x) for name, x in vars(upstream).items()})


BF16 = {"e_dtype": torch.bfloat16, "c_dtype": torch.bfloat16}
FILTER = {"data": "peaked", "spec": {"filter": "element", "threshold": 2.0**-9}}
MANY_TILES = {"data": "peaked", "spec": {**FILTER["spec"], "block_v": 16}}
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": BF16,
    "mixed": {"e_dtype": torch.bfloat16},
    "float16": {"e_dtype": torch.float16, "c_dtype": torch.float16},
    "online": {"spec": {"filter": "none", "lse_accumulation": "online"}},
    "softcap": {"softcap": 5.0},
    "entropy": {"outputs": ("entropy",)},
    "everything": {
        **BF16,
        "outputs": ("entropy", "weighted_logit", "prediction"),
        "softcap": 5.0,
        "logit_weight": True,
        "k": 3,
    },
    "closed-form": {"outputs": ("weighted_logit",), "logit_weight": True, **BF16},
    "order": {"vocab_order": True, **BF16},
    "rows-ignored": {"m": 750, **BF16},
    "rows-ignored-float32": {"m": 750},
    "strided": {"strided": True},
    "wide-rows": {"n": 3000, "d": 128, "v": 1000, **BF16},  # all rows of e, widened, take 1.5 MiB
    "only-e": {"wanted": ("e",), **BF16},
    "only-c": {"wanted": ("c",), **BF16},
    "filtered": FILTER,
    "filtered-bf16": {**FILTER, **BF16},
    "filtered-order": {**FILTER, **BF16, "vocab_order": True},
    "filtered-rows-ignored": {**FILTER, **BF16, "m": 750},
    "filtered-softcap-entropy": {**FILTER, "softcap": 6.0, "outputs": ("entropy",)},
    "filtered-many-tiles": MANY_TILES,
}


def make_case(name: str, scratch_bytes: int) -> Case:
    case = Case(name, n=500, d=48, v=4000, bias=True)
    case = replace(case, **CASES[name])
    return replace(case, spec={**case.spec, "scratch_bytes": scratch_bytes})


def make_maps(problem: Problem, spec: Spec) -> Maps[Tensor]:
    shape, dtype = (spec.tiles(problem.v), problem.n), problem.map_dtype(spec)
    return Maps(**{key: torch.empty(shape, dtype=dtype) for key in problem.maps(spec)})


@pytest.mark.parametrize("scratch_bytes", [MIB, 3 * MIB], ids=["1MiB", "3MiB"])
@pytest.mark.parametrize("name", CASES)
def test_peak(name: str, scratch_bytes: int) -> None:
    case, backend = make_case(name, scratch_bytes), TorchBackend()
    problem = make_problem(case, "cpu")
    spec = resolve(case.make_spec(), problem)
    assert not backend.unsupported(problem, spec)
    inputs, upstream = make_inputs(case, "cpu"), every_row_counts(make_upstream(case, "cpu", torch.float32))
    maps = make_maps(problem, spec)
    outputs, forward = peak_of(lambda: backend.forward(inputs, problem, spec, maps))
    gradients, backward = peak_of(lambda: backend.backward(inputs, problem, spec, outputs, maps, upstream))
    held = {
        "forward": forward - size_of(outputs) - vectors(problem),
        "backward": backward - size_of(gradients) - vectors(problem) - work_list(problem, spec),
    }
    over = {key: f"{size / scratch_bytes:.2f} of the budget" for key, size in held.items() if size > scratch_bytes}
    assert not over


@pytest.mark.parametrize("scratch_bytes", [4 * MIB, 16 * MIB], ids=["4MiB", "16MiB"])
@pytest.mark.parametrize("name", ["float32", "rows-ignored-float32", "only-e", "strided"])
def test_peak_in_one_pass(name: str, scratch_bytes: int) -> None:
    case, backend = make_case(name, scratch_bytes), TorchBackend()
    problem = make_problem(case, "cpu")
    spec, inputs = resolve(case.make_spec(), problem), make_inputs(case, "cpu")
    assert backend.one_pass(problem, spec)
    weights = torch.rand(problem.n, problem.k)
    (outputs, gradients), peak = peak_of(lambda: backend.loss_and_gradients(inputs, problem, spec, weights))
    assert peak - size_of(outputs) - size_of(gradients) - vectors(problem) <= scratch_bytes


@pytest.mark.parametrize("name", ["float32", "bf16", "everything", "filtered-order"])
def test_a_larger_budget_is_used(name: str) -> None:
    """Within its bounds, but not by doing without: the logits held at once do grow with it."""
    peaks = []
    for scratch_bytes in (MIB // 2, 2 * MIB):
        case = make_case(name, scratch_bytes)
        problem = make_problem(case, "cpu")
        spec, inputs = resolve(case.make_spec(), problem), make_inputs(case, "cpu")
        maps = make_maps(problem, spec)
        peaks.append(peak_of(lambda: TorchBackend().forward(inputs, problem, spec, maps))[1])  # noqa: B023
    assert peaks[1] > 1.5 * peaks[0]


@pytest.mark.parametrize("name", ["float32", "filtered-bf16"])
def test_less_than_one_tile_is_refused(name: str) -> None:
    problem = make_problem(make_case(name, 1), "cpu")
    needed = minimum_scratch(problem, resolve(make_case(name, 1).make_spec(), problem))
    for scratch_bytes, refused in ((needed - 1, True), (needed, False)):
        spec = resolve(make_case(name, scratch_bytes).make_spec(), problem)
        assert bool(TorchBackend().unsupported(problem, spec)) == refused
