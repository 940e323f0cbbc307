"""``explain`` says what a loss would do, ``live_fraction`` how much of it the filter leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cce
from cce.backends.problem import Inputs, Problem, Upstream
from cce.backends.resolve import resolve
from cce.backends.torch import TorchBackend
from cce.frontend.mean_logit import mean_logit_order
from cce.reference import clear_threshold, tiled
from cce.reference.backend import to_numpy
from cce.testing import Case
from cce.testing.data import make_inputs

N, D, V = 12, 6, 50


@pytest.fixture
def arguments() -> dict[str, Tensor]:
    return {
        "e": torch.randn(N, D, requires_grad=True),
        "c": torch.randn(V, D, dtype=torch.bfloat16, requires_grad=True),
        "targets": torch.arange(N),
    }


def test_fields(arguments: dict[str, Tensor]) -> None:
    found = cce.explain(**arguments, bias=torch.zeros(V), softcap=30, logit_scale=2, label_smoothing=0.1)
    assert found.backend == "torch"
    assert list(found.reasons) == cce.list_backends() and found.reasons["torch"] == found.reasons["reference"] == []
    assert found.problem == Problem(
        n=N,
        v=V,
        d=D,
        c_dtype=torch.bfloat16,
        bias=True,
        softcap=30.0,
        logit_scale=2.0,
        outputs=frozenset({"weighted_logit"}),
        grad_e=True,
        grad_c=True,
    )
    assert found.spec == resolve(cce.Spec(), found.problem)
    assert None not in (found.spec.block_n, found.spec.block_v, found.spec.filter, found.spec.threshold)


@pytest.mark.parametrize("with_grad", [True, False])
def test_gradients_wanted(arguments: dict[str, Tensor], with_grad: bool) -> None:
    with torch.set_grad_enabled(with_grad):
        problem = cce.explain(**{**arguments, "c": arguments["c"].detach()}).problem
    assert (problem.grad_e, problem.grad_c, problem.grad_bias) == (with_grad, False, False)


def test_autocast(arguments: dict[str, Tensor]) -> None:
    """What would run is what autocast makes of the arguments."""
    with torch.autocast("cpu", torch.bfloat16):
        found = cce.explain(**arguments)
    assert found.problem.e_dtype == found.problem.c_dtype == torch.bfloat16
    assert found.spec.filter == "none"


def seen_by(**options: Any) -> Problem:
    """The problem that ``cce.loss`` itself asks a backend about."""
    seen: list[Problem] = []

    class Watching(TorchBackend):
        name = "watching"

        def unsupported(self, problem: Problem, spec: cce.Spec) -> list[str]:
            seen.append(problem)
            return super().unsupported(problem, spec)

    cce.register_backend("watching", Watching)
    try:
        cce.loss(**options, backend="watching")
    finally:
        cce.unregister_backend("watching")
    return seen[0]


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-token": {"e": torch.randn(D), "targets": torch.tensor(3)},
    "batch": {"e": torch.randn(3, 4, D), "targets": torch.arange(12).view(3, 4)},
    "soft": {"targets": torch.arange(24).view(N, 2), "target_weight": torch.rand(N, 2)},
    "smoothing": {"label_smoothing": 0.1},
    "int-softcap": {"softcap": 30},
    "ignored": {"targets": torch.tensor([-100, 3] * 6)},
    "ignore_index": {"ignore_index": 5},
    "shift": {"e": torch.randn(3, 4, D), "targets": torch.arange(12).view(3, 4), "shift": 1},
}


@pytest.mark.parametrize("call", CALLS)
def test_problem_is_the_one_that_runs(arguments: dict[str, Tensor], call: str) -> None:
    """Ignored rows are counted in both: no values are read for the choice."""
    options = {**arguments, **CALLS[call]}
    assert cce.explain(**options).problem == seen_by(**options)


def test_text(arguments: dict[str, Tensor]) -> None:
    spec = cce.Spec(filter="element", threshold=2.0**-10, block_n=16, block_v=64, scratch_bytes=2**20, compensate=False)
    found = cce.explain(**arguments, spec=spec)
    refused = {name: found.reasons[name] for name in ("triton", "cupy", "numba")}
    assert all(refused.values())
    assert str(found).splitlines() == [
        "N=12 D=6 V=50, e torch.float32, c torch.bfloat16, on cpu",
        "would run: torch",
        "filter='element' threshold=0.000977 compensate=False, tiles 16 x 64, scratch 1 MiB",
        *(
            line
            for name, (first, *more) in refused.items()
            for line in (f"  {name}: {first}", *(f"    {reason}" for reason in more))
        ),
        "  torch: can run",
        "  reference: can run",
    ]


def test_text_where_nothing_runs(arguments: dict[str, Tensor]) -> None:
    found = cce.explain(**arguments, spec=cce.Spec(scratch_bytes=10))
    assert found.backend is None
    assert "would run: nothing" in str(found)
    assert found.reasons["torch"][0] in str(found) and "scratch_bytes=10 " in found.reasons["torch"][0]


def test_explain_computes_nothing(arguments: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchBackend, "forward", lambda *args: pytest.fail("a forward ran"))
    assert cce.explain(**arguments).backend == "torch"


CASE = Case("peaked", n=90, d=24, v=800, data="peaked", bias=True)
FILTER = {"filter": "element", "threshold": 2.0**-9, "block_n": 8, "block_v": 32, "vocab_order": "natural"}
SPECS = {
    "element": FILTER,
    "tile": {**FILTER, "filter": "tile", "threshold": 2.0**-6},
    "natural-rows": {**FILTER, "row_order": "natural"},
    "ragged": {**FILTER, "block_n": 7, "block_v": 50},
    "online": {**FILTER, "lse_accumulation": "online"},
    "order": {**FILTER, "block_v": 30, "vocab_order": torch.arange(800).flip(0)},
    "mean-logit": {**FILTER, "vocab_order": "mean_logit"},
}


def plain_mean_loss(fields: dict[str, Any], options: dict[str, Any], rows: Tensor) -> tuple[Inputs, cce.Spec, float]:
    """A trained classifier in small, a spec whose threshold no rounding can cross, and the reference's fraction."""
    inputs = make_inputs(CASE, "cpu")
    order = fields["vocab_order"]
    if isinstance(order, str):
        used = torch.full_like(inputs.targets, -1).index_copy_(0, rows, inputs.targets[rows])
        order = mean_logit_order(inputs.e, inputs.c, inputs.bias, used) if order == "mean_logit" else None
    used = replace(inputs, targets=inputs.targets[rows], rows=rows, vocab_order=order)
    problem = Problem(n=len(rows), v=CASE.v, d=CASE.d, bias=True, grad_e=True, grad_c=True, **options)
    spec = resolve(cce.Spec(**fields), problem)
    arrays, one = to_numpy(used), torch.ones(len(rows), 1)
    upstream = to_numpy(Upstream(one[:, 0], one))
    outputs, maps = tiled.forward(arrays, problem, spec)
    clear = clear_threshold(arrays, problem, spec, outputs, maps, upstream, near=spec.threshold)
    spec = replace(spec, threshold=clear)
    work = tiled.work_list(arrays, problem, spec, outputs, maps, upstream)
    return inputs, spec, work.live_fraction


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "logit_scale": 1.3}], ids=["plain", "softcap"])
@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_live_fraction_is_the_reference_s(fields: dict[str, Any], options: dict[str, Any], backend: str) -> None:
    inputs, spec, expected = plain_mean_loss(fields, options, torch.arange(CASE.n))
    assert 0.02 < expected < 0.98, "this data tests no filter"
    arguments = (inputs.e, inputs.c, inputs.targets[:, 0], inputs.bias)
    assert cce.live_fraction(*arguments, spec=spec, backend=backend, **options) == pytest.approx(expected, abs=1e-12)


def test_live_fraction_leaves_out_ignored_rows() -> None:
    """A third of the rows ignored, NaN in them, is a problem of the rest."""
    rows = torch.arange(CASE.n)[torch.arange(CASE.n) % 3 > 0]
    inputs, spec, expected = plain_mean_loss(FILTER, {}, rows)
    e, targets = inputs.e.clone(), inputs.targets[:, 0].clone()
    e[::3], targets[::3] = torch.nan, -7
    found = cce.live_fraction(e, inputs.c, targets, inputs.bias, spec=spec, ignore_index=-7)
    assert found == pytest.approx(expected, abs=1e-12)
    alone = cce.live_fraction(e[rows], inputs.c, targets[rows], inputs.bias, spec=spec)
    assert found == alone


def test_live_fraction_of_a_batch() -> None:
    inputs, spec, expected = plain_mean_loss(FILTER, {}, torch.arange(CASE.n))
    e, targets = inputs.e.view(9, 10, -1), inputs.targets.view(9, 10)
    assert cce.live_fraction(e, inputs.c, targets, inputs.bias, spec=spec) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exact_is_all_live(dtype: torch.dtype) -> None:
    """``filter="none"``, which is the default."""
    inputs = make_inputs(CASE, "cpu")
    e, c, targets = inputs.e.to(dtype), inputs.c.to(dtype), inputs.targets[:, 0]
    assert cce.live_fraction(e, c, targets) == 1.0
    assert cce.live_fraction(e, c, targets, spec=cce.Spec(filter="none")) == 1.0
    assert cce.live_fraction(e, c, targets, spec=cce.Spec(filter="element", threshold=2.0**-6)) < 1.0


def test_all_rows_ignored() -> None:
    inputs = make_inputs(CASE, "cpu")
    found = cce.live_fraction(inputs.e, inputs.c, torch.full((CASE.n,), -100), spec=cce.Spec(**FILTER))
    assert 0.0 <= found <= 1.0


def test_live_fraction_under_autocast() -> None:
    """Of the dtype that a loss under autocast has: bfloat16."""
    inputs = make_inputs(CASE, "cpu")
    arguments, spec = (inputs.e, inputs.c, inputs.targets[:, 0]), cce.Spec(filter="element", threshold=2.0**-6)
    with torch.autocast("cpu", torch.bfloat16):
        found = cce.live_fraction(*arguments, spec=spec)
    assert found == cce.live_fraction(inputs.e.bfloat16(), inputs.c.bfloat16(), inputs.targets[:, 0], spec=spec) < 1


class Marked(torch.Tensor):
    """A tensor of another class."""


@pytest.mark.parametrize("kind", ["a subclass", "watched", "inference", "no gradients"])
def test_live_fraction_of_tensors_with_values(kind: str) -> None:
    """However they were made, and whoever looks on."""
    rng = torch.Generator().manual_seed(0)
    c, y = torch.randn(2000, 16, generator=rng), torch.randint(20, (64,), generator=rng)
    e, spec = 3 * c[y], cce.Spec(filter="element", block_v=32, vocab_order="natural")
    expected = cce.live_fraction(e, c, y, spec=spec)
    assert 0 < expected < 1
    if kind == "a subclass":
        found = cce.live_fraction(e.as_subclass(Marked), c, y, spec=spec)
    elif kind == "watched":
        with FlopCounterMode(display=False):
            found = cce.live_fraction(e, c, y, spec=spec)
    elif kind == "inference":
        with torch.inference_mode():
            e = e.clone()
        found = cce.live_fraction(e, c, y, spec=spec)
    else:
        with torch.no_grad():
            found = cce.live_fraction(e, c, y, spec=spec)
    assert found == expected


def test_live_fraction_needs_values() -> None:
    e, c, y = torch.ones(3, 4, device="meta"), torch.ones(5, 4, device="meta"), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^e: got .*, expected a tensor whose values can be looked at"):
        cce.live_fraction(e, c, y.to("meta"), spec=cce.Spec(filter="element"))


def test_explain_names_an_option_of_a_wrong_type(arguments: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"^label_smoothing: got "):
        cce.explain(**arguments, label_smoothing=torch.zeros(2))
