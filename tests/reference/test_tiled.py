"""The tiled algorithm against the definition, and the filter against what it claims."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cce.backends.problem import Inputs, Problem
from cce.backends.resolve import resolve
from cce.reference import clear_threshold, dense, relative_error, threshold_margin, tiled
from cce.reference.worklist import Tiling
from cce.spec import Spec

GRADIENTS = ("de", "dc", "dbias")


def assert_same(result, expected, atol=1e-12):
    for field in dataclasses.fields(expected):
        x, y = getattr(result, field.name), getattr(expected, field.name)
        assert (x is None) == (y is None), field.name
        if y is not None:
            np.testing.assert_allclose(x, y, atol=atol, rtol=1e-12, err_msg=field.name)


def run(case, spec, problem=None):
    """Outputs, maps, work list and gradients of the tiled algorithm."""
    problem = problem or case.problem
    out, maps = tiled.forward(case.inputs, problem, spec)
    args = (case.inputs, problem, spec, out, maps, case.upstream)
    return out, maps, tiled.work_list(*args), tiled.backward(*args)


def exact(case):
    out = dense.forward(case.inputs, case.problem)
    return out, dense.backward(case.inputs, case.problem, out, case.upstream)


@pytest.mark.parametrize("lse_accumulation", ["tile", "online"])
@pytest.mark.parametrize("scratch_bytes", [1, 13 * 4 * 8 * 3, 2**20])
@pytest.mark.parametrize("blocks", [(1, 1), (4, 4), (3, 10), (64, 64)])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.8, "order": True}])
def test_without_filter_equals_dense(make_case, options, blocks, scratch_bytes, lse_accumulation):
    case = make_case(**options)
    spec = case.spec(
        filter="none",
        block_n=blocks[0],
        block_v=blocks[1],
        scratch_bytes=scratch_bytes,
        lse_accumulation=lse_accumulation,
    )
    out, _, work, gradients = run(case, spec)
    expected_out, expected = exact(case)
    assert_same(out, expected_out)
    assert_same(gradients, expected)
    assert work.live.all() and work.row_live.all() and work.live_fraction == 1.0


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(1, 20),
    block_n=st.integers(1, 10),
    block_v=st.integers(1, 21),
    scratch_bytes=st.integers(1, 2000),
    order=st.booleans(),
    cap=st.sampled_from([None, 1.5]),
)
def test_any_shape(make_case, n, v, block_n, block_v, scratch_bytes, order, cap):
    case = make_case(n, v, 3, 2, order=order, softcap=cap)
    spec = case.spec(filter="none", block_n=block_n, block_v=block_v, scratch_bytes=scratch_bytes)
    out, _, _, gradients = run(case, spec)
    expected_out, expected = exact(case)
    assert_same(out, expected_out)
    assert_same(gradients, expected)


def test_maps_of_tiles(make_case):
    case = make_case(order=True)
    spec = case.spec(filter="element", block_n=4, block_v=6)
    maps = tiled.forward(case.inputs, case.problem, spec)[1]
    z = dense.logits(case.inputs, case.problem)
    for t in range(spec.tiles(case.problem.v)):
        tile = z[:, case.inputs.vocab_order[t * 6 : (t + 1) * 6]]
        tile_lse = dense.log_sum_exp(tile)
        p = dense.softmax(tile, tile_lse)
        log_sum = tile_lse - tile.max(1)
        expected = {"tile_max": tile.max(1), "tile_log_sum": log_sum, "tile_entropy": -(p * np.log(p)).sum(1)}
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(maps, name)[t], value, atol=1e-12)


def naive_work(case, spec):
    """Hits (T, N) and live tiles, from the definition."""
    inputs, problem, upstream = case.inputs, case.problem, case.upstream
    z = dense.logits(inputs, problem)
    p = dense.softmax(z, dense.log_sum_exp(z))
    tiling = Tiling.of(inputs, problem, spec)
    hit = np.zeros((tiling.T, tiling.N), dtype=bool)
    for t in range(tiling.T):
        tile = tiling.vocabulary(t)
        for i in range(tiling.N):
            q = p[i, tile].max() if spec.filter == "element" else p[i, tile].sum()
            h = 0.0 if upstream.h is None else upstream.h[i]
            active = upstream.a[i] != 0 or upstream.g[i].any() or h != 0
            held = any(g != 0 and target in tile for g, target in zip(upstream.g[i], inputs.targets[i], strict=True))
            hit[t, i] = active and (q > spec.threshold or held)
    return hit


@pytest.mark.parametrize("row_order", ["live", "natural"])
@pytest.mark.parametrize("filter", ["element", "tile"])
@pytest.mark.parametrize("options", [{}, {"outputs": ("entropy",)}])
def test_work_list(make_peaked, filter, row_order, options):
    case = make_peaked(**options)
    case.upstream.a[7] = case.upstream.g[7] = 0.0  # an inactive row hits nothing, whatever its probabilities
    case.inputs.targets[8] = -1
    if case.upstream.h is not None:
        case.upstream.h[7] = 0.0
    spec = case.spec(filter=filter, row_order=row_order, threshold=2.0**-8, block_n=7, block_v=24)
    _, _, work, _ = run(case, spec)
    hit = naive_work(case, spec)
    np.testing.assert_array_equal(work.hit, hit)
    assert not hit[:, 7].any() and 0.05 < work.live_fraction < 0.9
    count = hit.sum(axis=0)
    order = sorted(range(60), key=lambda i: count[i]) if row_order == "live" else range(60)
    np.testing.assert_array_equal(work.row_order, list(order))
    area, row_live = 0, np.zeros_like(hit)
    for b in range(9):
        tokens = list(order)[b * 7 : (b + 1) * 7]
        for t in range(17):
            assert work.live[b, t] == hit[t, tokens].any()
            row_live[t, tokens] = work.live[b, t]
            area += work.live[b, t] * len(tokens) * min(24, 400 - 24 * t)
    np.testing.assert_array_equal(work.row_live, row_live)
    assert work.live_fraction == area / (60 * 400)


def explicit_dx(case, spec, work):
    """The dx (N, V) that the compensated algorithm stands for, from the definition."""
    inputs, problem, upstream = case.inputs, case.problem, case.upstream
    out = dense.forward(inputs, problem)
    inner = dataclasses.replace(upstream, s=None if problem.softcap is None else upstream.s)
    dx = dense.logit_gradient(inputs, problem, out, inner)
    uncapped = dataclasses.replace(problem, softcap=None)
    z = dense.logits(inputs, problem)
    coefficient = upstream.a[:, None] + np.zeros_like(z)
    if upstream.h is not None:
        coefficient += upstream.h[:, None] * ((out.lse - out.entropy)[:, None] - z)
    dz = dense.softmax(z, out.lse) * coefficient
    tiling = Tiling.of(inputs, uncapped, spec)
    for t in range(tiling.T):
        tile, dead = tiling.vocabulary(t), ~work.row_live[t]
        # The mean of dz over the tile, times the softcap's slope at log mean exp z.
        mean = dz[:, tile].mean(axis=1)
        if problem.softcap is not None:
            mean *= 1 - (np.log(np.exp(z[:, tile]).mean(axis=1)) / problem.softcap) ** 2
        dx[np.ix_(dead, tile)] = (problem.logit_scale * mean * spec.compensate)[dead, None]
    if upstream.s is not None and problem.softcap is None:
        dx += problem.logit_scale * upstream.s[:, None] * dense.logit_weights(inputs, problem)
    return dx


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("filter", ["element", "tile"])
@pytest.mark.parametrize(
    "options",
    [{}, {"outputs": ("entropy",)}, {"softcap": 20.0, "outputs": ("entropy",)}, {"outputs": ("weighted_logit",)}],
    ids=str,
)
def test_filtered_gradients_equal_an_explicit_dx(make_peaked, options, filter, compensate):
    case = make_peaked(**options)
    order = np.random.default_rng(4).permutation(400)
    order = np.concatenate([np.sort(block) for block in np.split(order, 5)])
    case = dataclasses.replace(case, inputs=dataclasses.replace(case.inputs, vocab_order=order))
    case = dataclasses.replace(case, problem=dataclasses.replace(case.problem, logit_scale=0.9))
    spec = case.spec(filter=filter, compensate=compensate, threshold=2.0**-7, block_n=7, block_v=24, scratch_bytes=9000)
    _, _, work, gradients = run(case, spec)
    assert 0.05 < work.live_fraction < 0.9
    dx = explicit_dx(case, spec, work)
    np.testing.assert_allclose(gradients.de, dx @ case.inputs.c, atol=1e-12)
    np.testing.assert_allclose(gradients.dc, dx.T @ case.inputs.e, atol=1e-12)
    np.testing.assert_allclose(gradients.dbias, dx.sum(axis=0), atol=1e-12)


@pytest.mark.parametrize("outputs", [(), ("entropy",)])
def test_compensation_removes_most_of_the_error(make_peaked, outputs):
    case = make_peaked(outputs=outputs)
    _, expected = exact(case)
    fields = {"filter": "element", "threshold": 2.0**-9, "block_n": 4, "block_v": 16}
    _, _, work, compensated = run(case, case.spec(**fields))
    _, _, _, dropped = run(case, case.spec(**fields, compensate=False))
    assert 0.05 < work.live_fraction < 0.9
    for name in GRADIENTS:
        error, without = (relative_error(getattr(x, name), getattr(expected, name)) for x in (compensated, dropped))
        assert without > 1e-3, "the filter drops too little for this test to show anything"
        # Rows of c share a mean, so de gains most. dc and dbias of a dead tile are spread evenly over entries
        # that are not alike, and here rows of e share nothing.
        assert error < without / (5 if name == "de" else 1.2), (name, error, without)
    # The rows of dz sum to what they should: the filter alone loses mass.
    total = (case.upstream.a - case.upstream.g[:, 0]).sum()
    assert compensated.dbias.sum() == pytest.approx(total, abs=1e-12)
    assert abs(dropped.dbias.sum() - total) > 1e-3


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("filter", ["none", "element", "tile"])
def test_masked_entries(make_peaked, filter, softcap):
    case = make_peaked(outputs=("entropy", "prediction"), softcap=softcap)
    case.inputs.bias[30:70] = -np.inf  # the tile 32:48 and more as a whole
    case.inputs.targets[(case.inputs.targets >= 30) & (case.inputs.targets < 70)] = 0
    expected_out, expected = exact(case)
    for lse_accumulation in ("tile", "online"):
        spec = case.spec(filter=filter, threshold=2.0**-7, block_v=16, lse_accumulation=lse_accumulation)
        out, _, work, gradients = run(case, spec)
        assert_same(out, expected_out)
        assert np.isfinite(gradients.de).all() and np.isfinite(gradients.dc).all()
        if filter == "none":
            assert_same(gradients, expected)
        else:  # masked also under a softcap
            assert not work.hit[2:4].any()
            assert not gradients.dc[32:64].any()


def test_a_row_masked_altogether_has_no_softmax(make_case):
    """Its log-sum-exp is -inf; the rest is NaN, as F.cross_entropy has it."""
    case = make_case(order=True)
    case.inputs.bias[:] = -np.inf
    for filter in ("none", "element", "tile"):
        out, _, _, gradients = run(case, case.spec(filter=filter, block_v=6))
        expected_out, expected = exact(case)
        assert_same(out, expected_out)
        assert_same(gradients, expected)
        named = case.inputs.targets >= 0
        assert np.isneginf(out.lse).all() and np.isnan(out.entropy).all() and np.isnan(out.nll[named]).all()
        assert np.isnan(gradients.de).all() and np.isnan(gradients.dbias).all()


def test_only_what_is_asked_for(make_case):
    case = make_case(outputs=())
    problem = dataclasses.replace(case.problem, grad_c=False, grad_bias=False)
    out, _, _, gradients = run(case, case.spec(filter="none"), problem)
    assert out.entropy is out.weighted_logit is out.prediction is gradients.dc is gradients.dbias is None
    assert gradients.de.shape == (13, 5)


def test_tie_across_tiles_goes_to_the_first_in_the_order():
    inputs = Inputs(np.ones((1, 1)), np.ones((4, 1)), np.array([[0]]), vocab_order=np.array([2, 0, 3, 1]))
    problem = Problem(1, 4, 1, outputs=frozenset({"prediction"}))
    spec = resolve(Spec(block_v=1), problem)
    assert tiled.forward(inputs, problem, spec)[0].prediction == 2


@pytest.mark.parametrize("filter", ["element", "tile"])
def test_threshold_margin_and_clear_threshold(make_peaked, filter):
    case = make_peaked()
    spec = case.spec(filter=filter, threshold=2.0**-8, block_n=4, block_v=16)
    out, maps, work, _ = run(case, spec)
    args = (out, maps, case.upstream)
    margin = threshold_margin(case.inputs, case.problem, spec, *args)
    assert 0 < margin < 1e-2

    def live(threshold):
        other = dataclasses.replace(spec, threshold=threshold)
        return tiled.work_list(case.inputs, case.problem, other, *args).hit

    # Moving the threshold by less than the margin changes no decision; by more, in one direction, it does.
    for step in (1, -1):
        np.testing.assert_array_equal(live(spec.threshold * math.exp(step * margin * 0.999)), work.hit)
    moved = [live(spec.threshold * math.exp(step * margin * 1.001)) for step in (1, -1)]
    assert sum((hit != work.hit).sum() for hit in moved) == 1

    clear = clear_threshold(case.inputs, case.problem, spec, *args, near=spec.threshold, margin=5e-3)
    at_clear = dataclasses.replace(spec, threshold=clear)
    assert threshold_margin(case.inputs, case.problem, at_clear, *args) >= 5e-3
    assert abs(math.log(clear / spec.threshold)) < 0.5


def test_nothing_to_decide(make_case):
    case = make_case()
    spec = case.spec(filter="none")
    args = (*tiled.forward(case.inputs, case.problem, spec), case.upstream)
    assert threshold_margin(case.inputs, case.problem, spec, *args) == math.inf
    assert clear_threshold(case.inputs, case.problem, spec, *args, near=0.25) == 0.25
