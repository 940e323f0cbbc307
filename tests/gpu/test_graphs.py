"""Nothing waits for the GPU: calls in CUDA graphs, calls under torch's watch, calls under the profiler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from heads import peaked
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from watch import captured, nothing_waits

import cce

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

SPECS = {
    "exact": cce.Spec(filter="none", scratch_bytes=2**22),  # too few for one pass
    "filtered": cce.Spec(filter="element", scratch_bytes=2**24),
    "natural": cce.Spec(filter="element", vocab_order="natural"),
    "one-pass": cce.Spec(),
}
N, D, V = 512, 256, 20_001


@pytest.fixture(autouse=True)
def only_what_it_has(backend: str, request: pytest.FixtureRequest) -> None:
    if backend != "triton" and "name" in request.fixturenames and request.getfixturevalue("name") == "one-pass":
        pytest.skip("it has no pass that computes gradients along with the loss")


def loss_of(e: Tensor, c: Tensor, bias: Tensor, targets: Tensor, name: str, backend: str) -> Tensor:
    return cce.loss(e, c, targets, bias, backend=backend, spec=SPECS[name])


def run(e: Tensor, c: Tensor, bias: Tensor, targets: Tensor, name: str, backend: str) -> list[Tensor]:
    """Loss and gradients."""
    loss = loss_of(e, c, bias, targets, name, backend)
    return [loss.detach(), *torch.autograd.grad(loss, (e, c, bias))]


def inputs(seed: int, ignored: bool) -> list[Tensor]:
    head = peaked(N, D, V, seed=seed)
    bias = torch.randn(V, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    if ignored:
        head.targets[seed :: 5 + seed] = -100
    return [*head.leaves(), bias.bfloat16().requires_grad_(), head.targets]


@pytest.mark.parametrize("name", SPECS)
def test_graph(backend: str, name: str) -> None:
    """Replays with other data give the bits of eager calls."""
    # Rows without a target: left out by the exact backward in an eager call, which asks the GPU for them, and computed
    # as zeros in a graph. The sums then run over other rows, so that their bits may differ.
    ignored = name != "exact"
    static = inputs(0, ignored)
    graph, results = captured(lambda: run(*static, name, backend))
    for seed in (0, 1, 2):
        fresh = inputs(seed, ignored)
        with torch.no_grad():
            for to, value in zip(static, fresh, strict=True):
                to.copy_(value)
        graph.replay()
        for what, x, y in zip(("loss", "dE", "dC", "dbias"), results, run(*fresh, name, backend), strict=True):
            assert torch.equal(x, y), f"{what}, seed {seed}"


def test_graph_of_ignored_rows(backend: str) -> None:
    """The exact backward: zeros in rows without a target, and the others as in an eager call, to rounding."""
    static = inputs(1, ignored=True)
    expected = run(*static, "exact", backend)
    graph, results = captured(lambda: run(*static, "exact", backend))
    graph.replay()
    assert not results[1][static[3] == -100].any()
    for what, x, y in zip(("loss", "dE", "dC", "dbias"), results, expected, strict=True):
        assert (x.float() - y.float()).norm() <= 2**-8 * y.float().norm(), what  # the roundoff of bfloat16


def calls(backend: str, name: str, ignored: bool) -> list[tuple[str, Callable[[], object]]]:
    """What must not wait; the exact backward alone may ask, once, which rows have a target."""
    e, c, bias, targets = inputs(0, ignored)
    found: list[tuple[str, Callable[[], object]]] = [("forward", lambda: loss_of(e, c, bias, targets, name, backend))]
    if name != "exact":
        loss = loss_of(e, c, bias, targets, name, backend)
        found.append(("backward", lambda: torch.autograd.grad(loss, (e, c, bias), retain_graph=True)))
    return found


@pytest.mark.parametrize("ignored", [False, True], ids=["all-rows", "ignored-rows"])
@pytest.mark.parametrize("name", SPECS)
def test_nothing_waits(backend: str, name: str, ignored: bool) -> None:
    """As torch tells: its operations that wait raise."""
    with pytest.raises(RuntimeError, match="synchroniz"), nothing_waits():
        torch.ones(3, device="cuda").nonzero()
    for _, call in calls(backend, name, ignored):
        call()  # compiles
        torch.cuda.synchronize()
        with nothing_waits():
            call()


@pytest.mark.parametrize("name", SPECS)
def test_nothing_waits_in_a_profile(backend: str, name: str) -> None:
    """As the driver tells: no call to wait, and nothing copied to the host."""
    for what, call in calls(backend, name, ignored=True):
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            with record_function("the call"):
                call()
            torch.cuda.synchronize()
        events = profiler.events()
        whole = next(event.time_range for event in events if event.name == "the call")
        inside = {e.name for e in events if whole.start <= e.time_range.start <= whole.end}
        if not any("Launch" in found for found in inside):
            pytest.skip("the profiler sees no launches here")
        waits = {found for found in inside if "Synchronize" in found}
        # A copy to pinned memory goes on while the host does; who waits for it shows above.
        copies = {event.name for event in events if "DtoH" in event.name and "Pinned" not in event.name}
        assert not waits | copies, f"{what}: {waits | copies}"
