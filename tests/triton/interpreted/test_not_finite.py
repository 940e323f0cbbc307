"""Where NaN and infinities stand in results: where those of the definition do, also under a filter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from calls import BACKEND, SPECS, Call, check, loss_of

from cce.backends.problem import Upstream

N, D, V = 20, 4, 80
NAN, INF = math.nan, math.inf


def problem(**options: object) -> Call:
    """Two blocks of rows, of which one is ignored; five of entries, of which the last three are dead under a filter."""
    rng = torch.Generator().manual_seed(1)
    e, c = torch.randn(N, D, generator=rng), torch.randn(V, D, generator=rng)
    targets, bias = torch.randint(32, (N,), generator=rng), torch.randn(V, generator=rng)
    targets[3], bias[32:] = -1, -60.0
    call = loss_of(e, c, targets, bias, **options)
    up = call.upstream
    return replace(call, upstream=replace(up, a=up.a * torch.linspace(0.5, 1.5, N), g=up.g))


def at(name: str, *where: object, value: float) -> Callable[[Call], None]:
    """A change of a number, or of some, of an input or an upstream gradient."""

    def change(call: Call) -> None:
        of = call.inputs if hasattr(call.inputs, name) else call.upstream
        getattr(of, name)[where] = value

    return change


def both(*changes: Callable[[Call], None]) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        for each in changes:
            each(call)

    return change


def target_of(call: Call, row: int) -> int:
    return int(call.inputs.targets[row, 0])


NOTHING_SENT = both(at("a", 5, value=0.0), at("g", 5, value=0.0))
PATTERNS: dict[str, Callable[[Call], None]] = {
    "nothing": lambda call: None,
    "NaN in a row": at("e", 5, 1, value=NAN),
    "NaN in a row to which nothing is sent": both(NOTHING_SENT, at("e", 5, value=NAN)),
    "infinity in a row": at("e", 5, 1, value=INF),
    "infinity and NaN in a row": both(at("e", 5, 1, value=INF), at("e", 5, 2, value=NAN)),
    "NaN in an ignored row": at("e", 3, value=NAN),
    "infinity in an ignored row": at("e", 3, value=-INF),
    "an ignored row's logits far above its log-sum-exp of 0": at("bias", 7, value=200.0),
    "NaN in an entry": at("c", 9, 0, value=NAN),
    "NaN in a dead entry": at("c", 40, value=NAN),
    "all masked": at("bias", slice(None), value=-INF),
    "all but one masked": both(at("bias", slice(None), value=-INF), at("bias", 20, value=0.5)),
    "a block masked": at("bias", slice(16, 32), value=-INF),
    "a target masked": lambda call: at("bias", target_of(call, 5), value=-INF)(call),
    "bias of infinity": at("bias", 9, value=INF),
    "bias of NaN": at("bias", 9, value=NAN),
    "NaN sent to a row": at("a", 5, value=NAN),
    "infinity sent to a row": at("a", 5, value=INF),
    "NaN sent to a target": both(at("a", 5, value=NAN), at("g", 5, value=NAN)),
    "logits near overflow": at("e", 5, value=1e37),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", [*SPECS, "one pass"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
def test_pattern(name: str, pattern: str) -> None:
    call = problem(spec=SPECS.get(name))
    if name == "one pass":  # its gradient of lse is the sum of those of nll
        call = replace(call, upstream=replace(call.upstream, a=call.upstream.g[:, 0]))
    PATTERNS[pattern](call)
    if name == "one pass":
        call.upstream.g[:, 0] = call.upstream.a
    if name.startswith("filtered") and "nothing is sent" in pattern:
        check_left_out(call, 5)
    else:
        check(call)


def check_left_out(call: Call, row: int) -> None:
    """A filter computes nothing for a row to which nothing is sent, whatever it holds; as on every backend."""
    found = call.run()
    call.inputs.e[row] = 0
    expected = call.run()
    assert not found["de"][row].any()
    for name in ("de", "dc", "dbias"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("pattern", ["nothing", "NaN in a row", "all masked", "a block masked", "a target masked"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_pattern_with_all_options(name: str, pattern: str) -> None:
    call = problem(spec=SPECS[name], softcap=20.0, logit_scale=1.5)
    h = torch.linspace(-1, 1, N).masked_fill(call.inputs.targets[:, 0] < 0, 0)
    call = replace(call, upstream=replace(call.upstream, h=h))
    PATTERNS[pattern](call)
    check(call)


@pytest.mark.parametrize("name", ["filtered", "filtered by mass, online"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_map_of_rows_without_softmax(name: str) -> None:
    """They need every block; where there are others, the dead blocks of these stay dead."""
    call = problem(spec=SPECS[name])
    call.inputs.bias[9] = INF
    maps = call.forward()[1]
    assert maps.tile_mass is not None and (maps.tile_mass[:, call.inputs.targets[:, 0] >= 0] < 0).all()
    call = problem(spec=SPECS[name])
    call.inputs.e[5, 1] = NAN
    _, maps, spec = call.forward()
    assert maps.tile_mass is not None and (maps.tile_mass[:, 5] < 0).all()
    assert (maps.tile_mass[2:, :5] >= 0).all()
    live = BACKEND.work_list(call.inputs, call.problem, spec, maps, call.upstream).row_live
    assert live[:, 5].all() and not live.all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gradient_of_entropy(name: str, value: float) -> None:
    """Of one row it is not finite: nowhere in dC is it, not even in dead blocks."""
    call = problem(spec=SPECS[name])
    h = torch.zeros(N)
    h[5] = value
    check(replace(call, upstream=replace(call.upstream, h=h)))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_but_nan(name: str) -> None:
    call = problem(spec=SPECS[name])
    call.inputs.e.fill_(NAN)
    check(call)


def test_upstream_without_target_does_not_count() -> None:
    """In one pass, whatever stands there."""
    call = problem(spec=None)
    call = replace(call, upstream=Upstream(call.upstream.g[:, 0], call.upstream.g))
    expected = call.run()
    call.upstream.g[3] = NAN
    found = call.run()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_weights_of_zero_on_masked_entries() -> None:
    """0 times -inf is NaN, as in PyTorch, and no other weight of 0 is; columns beyond the last have none."""
    call = problem(spec=SPECS["exact"], softcap=5.0)
    weight = torch.ones(V)
    weight[70:] = 0
    s = call.upstream.g[:, 0]
    call = replace(call, inputs=replace(call.inputs, logit_weight=weight), upstream=replace(call.upstream, s=s))
    used = call.inputs.targets[:, 0] >= 0
    assert call.run()["weighted_logit"].isfinite().all()
    call.inputs.bias[71] = -INF
    assert torch.equal(call.run()["weighted_logit"].isnan(), used)
