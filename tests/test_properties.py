"""Random sizes and options: the torch backend against the reference, and identities that hold for every loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cce
from cce.backends.torch import TorchBackend
from cce.testing import Case, run_case

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=30, deadline=None, derandomize=True)
many = settings(max_examples=150, deadline=None, derandomize=True)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

specs = st.fixed_dictionaries(
    {
        "filter": st.sampled_from(["none", "element", "tile"]),
        "block_n": st.integers(1, 9),
        "block_v": st.integers(1, 40),
        "lse_accumulation": st.sampled_from(["tile", "online"]),
        "compensate": st.booleans(),
        "row_order": st.sampled_from(["live", "natural"]),
        "threshold": st.sampled_from([2.0**-12, 2.0**-8, 2.0**-5, 0.1]),
        "accumulate": st.sampled_from([None, "float64"]),
        "scratch_bytes": st.sampled_from([2**27, 2**17, 2**15]),
    }
)


@st.composite
def cases(draw: Any) -> Case:
    n, k = draw(st.integers(1, 20)), draw(st.sampled_from([1, 1, 2, 5]))
    dtypes = st.sampled_from(DTYPES)
    e_dtype = draw(dtypes)
    v = draw(st.integers(1, 90))
    outputs = tuple(name for name in ("entropy", "weighted_logit", "prediction") if draw(st.booleans()))
    data = ["random", "peaked", "aligned", "large_bias"]
    if v > 1 and "weighted_logit" not in outputs:  # which a masked entry makes -inf
        data.append("masked")
    return Case(
        "random",
        n=n,
        d=draw(st.integers(1, 12)),
        v=v,
        k=k,
        m=draw(st.sampled_from([None, n, n + 3])),
        e_dtype=e_dtype,
        c_dtype=draw(st.one_of(st.just(e_dtype), dtypes)),
        data=draw(st.sampled_from(data)),
        strided=draw(st.booleans()),
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 0.5, 6.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.3, 2.0])),
        outputs=outputs,
        logit_weight=draw(st.booleans()),
        vocab_order=draw(st.booleans()),
        wanted=draw(st.sampled_from([("e", "c", "bias"), ("e",), ("c",), ("bias", "e")])),
        spec=draw(specs),
    )


@many
@given(case=cases())
def test_torch_backend_equals_reference(case: Case) -> None:
    result = run_case(TorchBackend(), case)
    if result.refused:
        assert all("scratch_bytes" in reason for reason in result.refused)
        result = run_case(TorchBackend(), replace(case, spec={**case.spec, "scratch_bytes": 2**27}))
    failures = [line for line in result.failures if "tests no filter" not in line]  # a random case need not
    assert not result.refused and not failures, failures


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    """Arguments of ``cce.loss``: exact, in float64, with a bias, some rows ignored."""
    n, d, v = draw(st.integers(1, 12)), draw(st.integers(1, 8)), draw(st.integers(1, 60))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    targets = torch.randint(v, (n,), generator=rng)
    targets[torch.rand(n, generator=rng) < 0.2] = -100
    block_n, block_v = draw(st.integers(1, 5)), draw(st.integers(1, 30))
    return {
        "e": tensor(n, d),
        "c": tensor(v, d),
        "targets": targets,
        "bias": tensor(v),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
        "spec": cce.Spec(
            filter="none", block_n=block_n, block_v=block_v, lse_accumulation=draw(st.sampled_from(["tile", "online"]))
        ),
    }


@st.composite
def losses(draw: Any) -> dict[str, Any]:
    """The same with the options that only ``cce.loss`` has."""
    problem = draw(problems())
    n, v = len(problem["e"]), len(problem["c"])
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        problem["weight"] = torch.rand(v, generator=rng)
    if draw(st.booleans()):
        problem["token_weight"] = torch.rand(n, generator=rng)
    problem["label_smoothing"] = draw(st.sampled_from([0.0, 0.2, 1.0]))
    problem["z_loss"] = draw(st.sampled_from([0.0, 0.01]))
    return problem


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def gradients(loss: Tensor, problem: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [problem[name] for name in ("e", "c", "bias")])


@few
@given(problem=losses())
def test_reductions_of_none(problem: dict[str, Any]) -> None:
    per_token = cce.loss(**problem, reduction="none")
    near(cce.loss(**problem, reduction="sum"), per_token.sum())
    w = problem.get("token_weight", torch.ones(len(per_token))).double() * (problem["targets"] >= 0)
    if "weight" in problem:
        w = w * problem["weight"].double()[problem["targets"].clamp(min=0)]
    near(cce.loss(**problem), per_token.sum() / w.sum())


@few
@given(problem=losses(), data=st.data())
def test_rows_in_another_order(problem: dict[str, Any], data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(problem["e"])))))
    moved = {name: problem[name][order] for name in ("e", "targets", "token_weight") if name in problem}
    near(cce.loss(**{**problem, **moved}, reduction="none"), cce.loss(**problem, reduction="none")[order])
    found, expected = (gradients(cce.loss(**p, reduction="sum"), problem) for p in ({**problem, **moved}, problem))
    for x, y in zip(found, expected, strict=True):
        near(x, y)


@few
@given(problem=losses(), data=st.data())
def test_vocabulary_in_another_order(problem: dict[str, Any], data: st.DataObject) -> None:
    """Relabelled rows of ``c`` and targets, or ``vocab_order`` with the labels as they are: the same loss."""
    v = len(problem["c"])
    order = torch.tensor(data.draw(st.permutations(range(v))))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(v))
    moved = {name: problem[name][order] for name in ("c", "bias", "weight") if name in problem}
    moved["targets"] = torch.where(problem["targets"] < 0, problem["targets"], place[problem["targets"].clamp(min=0)])
    ordered = {"spec": replace(problem["spec"], vocab_order=order)}
    expected = cce.loss(**problem, reduction="none")
    wanted = gradients(expected.sum(), problem)
    for change in (moved, ordered):
        found = cce.loss(**{**problem, **change}, reduction="none")
        near(found, expected)
        for x, y in zip(gradients(found.sum(), problem), wanted, strict=True):
            near(x, y)


@few
@given(problem=problems(), constant=st.floats(-50, 50))
def test_constant_added_to_the_bias(problem: dict[str, Any], constant: float) -> None:
    problem["softcap"] = None
    before, after = cce.terms(**problem), cce.terms(**{**problem, "bias": problem["bias"] + constant})
    moved = before.lse + constant * problem["logit_scale"]
    near(after.lse, torch.where(problem["targets"] < 0, 0, moved))
    near(after.nll, before.nll)
    near(after.entropy, before.entropy)
    assert torch.equal(after.prediction, before.prediction)


@few
@given(problem=problems(), data=st.data())
def test_vector_added_to_every_row_of_c(problem: dict[str, Any], data: st.DataObject) -> None:
    """The softmax sees differences of logits only."""
    problem["softcap"] = None
    vector = torch.tensor(data.draw(st.lists(st.floats(-3, 3), min_size=(d := problem["e"].shape[1]), max_size=d)))
    near(cce.loss(**{**problem, "c": problem["c"] + vector}), cce.loss(**problem))


@few
@given(problem=problems(), power=st.integers(-8, 8))
def test_scale_moved_between_factors(problem: dict[str, Any], power: int) -> None:
    """Powers of two round nothing: from ``e`` to ``c`` not a bit of the loss changes."""
    s = 2.0**power
    moved = {"e": problem["e"] * s, "c": problem["c"] / s}
    assert torch.equal(cce.loss(**{**problem, **moved}, reduction="none"), cce.loss(**problem, reduction="none"))


@few
@given(problem=losses(), cut=st.floats(0, 1))
def test_sum_over_parts_of_the_batch(problem: dict[str, Any], cut: float) -> None:
    at = int(cut * len(problem["e"]))
    rows = [name for name in ("e", "targets", "token_weight") if name in problem]
    parts = ({**problem, **{name: problem[name][here] for name in rows}} for here in (slice(at), slice(at, None)))
    near(sum(cce.loss(**part, reduction="sum") for part in parts), cce.loss(**problem, reduction="sum"))


@few
@given(problem=problems(), dtype=st.sampled_from(DTYPES), scale=st.sampled_from([0.0, 1.0, 30.0]))
def test_ranges(problem: dict[str, Any], dtype: torch.dtype, scale: float) -> None:
    """nll >= 0, entropy in [0, log V], and the predicted entry's nll at most log V."""
    v, used = len(problem["c"]), problem["targets"] >= 0
    e, c, bias = (x.detach().mul(scale).to(dtype) for x in (problem["e"], problem["c"], problem["bias"]))
    problem = {**problem, "e": e, "c": c, "bias": bias}
    out = cce.terms(**problem)
    above = math.log(v) * (1 + 1e-6) + 1e-6
    assert bool((out.nll >= 0).all()) and bool((out.entropy >= 0).all()) and bool((out.entropy <= above).all())
    assert torch.equal(out.prediction < 0, ~used) and bool((out.prediction < v).all())
    best = cce.terms(**{**problem, "targets": out.prediction, "ignore_index": -1}, outputs=["nll"]).nll
    assert bool((best <= out.nll)[used].all()) and bool((best <= above).all())
    if scale == 0:
        near(out.entropy[used].double(), torch.full_like(out.entropy[used], math.log(v)).double(), 1e-6)


@few
@given(problem=problems(), filter=st.sampled_from(["none", "element", "tile"]), threshold=st.floats(1e-4, 0.5))
def test_identities_of_the_gradient(problem: dict[str, Any], filter: str, threshold: float) -> None:
    """The softmax sums to 1, skipped tiles and what stands for them included.

    So dbias and the rows of dC sum to 0; and <e, dE> = <c, dC>, both being the sum of dx * (e c^T).
    """
    problem.update(softcap=None, spec=replace(problem["spec"], filter=filter, threshold=threshold))
    de, dc, dbias = gradients(cce.loss(**problem, reduction="sum"), problem)
    near(dbias.sum(), torch.zeros(()).double())
    near(dc.sum(0), torch.zeros(dc.shape[1]).double())
    near((problem["e"] * de).sum(), (problem["c"] * dc).sum())


def test_uncompensated_gradient_breaks_the_identity() -> None:
    """The test above can fail: without compensation the same sum misses what was skipped."""
    rng = torch.Generator().manual_seed(0)
    e, c, bias = (
        torch.randn(*s, generator=rng, dtype=torch.float64).requires_grad_() for s in ((9, 4), (60, 4), (60,))
    )
    spec = cce.Spec(filter="element", threshold=0.1, block_n=1, block_v=5, compensate=False)
    loss = cce.loss(e, c, torch.arange(9), bias, spec=spec, reduction="sum")
    assert abs(float(torch.autograd.grad(loss, bias)[0].sum())) > 0.1
