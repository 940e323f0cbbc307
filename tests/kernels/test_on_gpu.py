"""The host code on a GPU: the kit, nothing that waits, and CUDA graphs; its own memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from doubles import DenseKernels, IdleKernels
from torch import Tensor
from watch import captured, nothing_waits

import cce
from cce import registry
from cce.backends.gpu.kernels import Kernels
from cce.backends.problem import Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.resolve import resolve
from cce.testing import BEHAVIOURS, CASES, Case, run_case
from cce.testing.behaviours import Behaviour
from cce.testing.kernels import contract
from cce.testing.kernels.cases import CASES as CONTRACT
from cce.testing.kernels.plain import PlainKernels
from cce.testing.kernels.plain_backend import PlainBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]
MIB = 2**20


class DenseBackend(PlainBackend):
    """Asks the GPU nothing."""

    name = "dense"
    device = "cuda"

    def kernels(self) -> Kernels:
        return DenseKernels()


class IdleBackend(PlainBackend):
    """Host code alone."""

    name = "idle"
    device = "cuda"

    def kernels(self) -> Kernels:
        return IdleKernels()


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    for backend in (PlainBackend, DenseBackend):
        cce.register_backend(backend.name, backend)
    yield
    for backend in (PlainBackend, DenseBackend):
        cce.unregister_backend(backend.name)


@pytest.mark.parametrize("case", CONTRACT, ids=str)
def test_contract(case: Any) -> None:
    _, passed, message = contract.run_case(PlainKernels(), case, "cuda")
    assert passed, message


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    result = run_case(registry.load("dense"), case, "cuda")
    assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("case", [case for case in CASES if "filtered" in case.name], ids=str)
def test_filtered_by_the_plan(case: Case) -> None:
    result = run_case(registry.load("plain"), case, "cuda")
    assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_behaviour(behaviour: Behaviour) -> None:
    behaviour("dense", "cuda")


SPECS = {
    "exact": cce.Spec(filter="none", scratch_bytes=2**18),
    "filtered": cce.Spec(filter="element", threshold=2.0**-9, scratch_bytes=2**18, block_n=32, block_v=32),
    "natural": cce.Spec(filter="tile", threshold=2.0**-6, vocab_order="natural", block_n=32, block_v=32),
}


def leaves(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """e, c, bias and targets of a head with peaked probabilities."""
    rng = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=rng)

    targets = torch.randint(1501, (130,), device="cuda", generator=rng)
    e, c = draw(130, 75) + 1, draw(1501, 75) * 0.2
    c -= torch.arange(1, 1502, device="cuda").log()[:, None] * 0.01
    return [x.to(dtype).requires_grad_() for x in (e, c, draw(1501))] + [targets]


def loss_of(e: Tensor, c: Tensor, bias: Tensor, targets: Tensor, name: str) -> Tensor:
    spec = SPECS[name]
    outputs = ("nll", "entropy") if spec.filter == "none" else ("nll",)  # a filter takes no gradient of an entropy
    out = cce.terms(e, c, targets, bias, outputs=outputs, backend="dense", spec=spec)
    assert out.nll is not None
    return (out.nll if out.entropy is None else out.nll + 0.1 * out.entropy).mean()


def run(e: Tensor, c: Tensor, bias: Tensor, targets: Tensor, name: str) -> list[Tensor]:
    loss = loss_of(e, c, bias, targets, name)
    return [loss.detach(), *torch.autograd.grad(loss, (e, c, bias))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_nothing_waits(name: str, dtype: torch.dtype) -> None:
    e, c, bias, targets = leaves(0, dtype)
    targets[::5] = -100
    run(e, c, bias, targets, name)
    loss = loss_of(e, c, bias, targets, name)
    torch.cuda.synchronize()
    with nothing_waits():
        loss_of(e, c, bias, targets, name)
        if name != "exact":  # which may ask once
            torch.autograd.grad(loss, (e, c, bias))


@pytest.mark.parametrize("name", SPECS)
def test_graph(name: str) -> None:
    """Replays with other data give the bits of eager calls."""
    static = leaves(0, torch.bfloat16)
    graph, results = captured(lambda: run(*static, name))
    for seed in (0, 1):
        fresh = leaves(seed, torch.bfloat16)
        with torch.no_grad():
            for to, value in zip(static, fresh, strict=True):
                to.copy_(value)
        graph.replay()
        for what, x, y in zip(("loss", "dE", "dC", "dbias"), results, run(*fresh, name), strict=True):
            assert torch.equal(x, y), f"{what}, seed {seed}"


def test_graph_of_ignored_rows() -> None:
    static = leaves(1, torch.bfloat16)
    static[3][::3] = -100
    expected = run(*static, "exact")
    graph, results = captured(lambda: run(*static, "exact"))
    graph.replay()
    assert not results[1][static[3] == -100].any()
    for what, x, y in zip(("loss", "dE", "dC", "dbias"), results, expected, strict=True):
        assert (x.float() - y.float()).norm() <= 2**-8 * y.float().norm(), what


def large(order: bool, filter: str) -> tuple[Problem, cce.Spec, Inputs[Tensor], Maps[Tensor]]:
    """The head of a model of 8 billion parameters, and a map in which a twelfth of the blocks is hit."""
    n, d, v = 8192, 4096, 128_256
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    problem = Problem(n, v, d, 1, torch.bfloat16, torch.bfloat16, "cuda", grad_e=True, grad_c=True)
    spec = resolve(cce.Spec(filter=filter), problem)
    e, c = torch.zeros(n, d, **bf16), torch.zeros(v, d, **bf16)
    place = torch.randperm(v, device="cuda") if order else None
    targets = torch.randint(v // 20, (n, 1), device="cuda")
    mass = torch.full((spec.tiles(v), n), 1e-3, dtype=torch.float16, device="cuda")
    mass[: spec.tiles(v) // 12] *= -1
    maps = Maps(mass) if problem.maps(spec) else Maps()
    return problem, spec, Inputs(e, c, targets, vocab_order=place), maps


def phases(order: bool, filter: str) -> dict[str, Callable[[], Any]]:
    """Forward and backward of idle kernels at that size."""
    problem, spec, inputs, maps = large(order, filter)
    row = torch.ones(problem.n, device="cuda")
    written = Maps(None if maps.tile_mass is None else torch.empty_like(maps.tile_mass))
    backend, outputs, upstream = IdleBackend(), Outputs(row, row[:, None]), Upstream(row, row[:, None])
    return {
        "forward": lambda: backend.forward(inputs, problem, spec, written),
        "backward": lambda: backend.backward(inputs, problem, spec, outputs, maps, upstream),
    }


#: Bytes over the results, with 128 MiB of scratch; the forward under a filter holds statistics of the map's tiles too.
ALLOWED = {
    "none": {"forward": 2 * MIB, "backward": 193 * MIB},
    "element": {"forward": 256 * MIB, "backward": 256 * MIB},
}


@pytest.mark.parametrize("order", [False, True], ids=["natural", "ordered"])
@pytest.mark.parametrize("filter", ["none", "element"])
def test_memory(filter: str, order: bool) -> None:
    over = {}
    for name, phase in phases(order, filter).items():
        phase()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = phase()
        peak = torch.cuda.max_memory_allocated() - before
        kept = sum(x.nbytes for x in vars(results).values() if x is not None)
        if peak - kept > ALLOWED[filter][name]:
            over[name] = f"{(peak - kept) / MIB:.0f} MiB over the results"
        del results
    assert not over
