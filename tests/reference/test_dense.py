"""The definition against PyTorch, and its gradients against finite differences."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from cce.backends.problem import Inputs, Problem, Upstream
from cce.reference import dense

OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": 0.7},
    "softcap": {"softcap": 3.0},
    "softcap, scale": {"softcap": 2.0, "logit_scale": -1.3},
    "no bias, all rows": {"bias": False, "rows": False, "k": 1},
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch_cross_entropy(make_case, smoothing):
    case = make_case(k=1, seed=1)
    inputs = case.inputs
    keep = inputs.targets[:, 0] >= 0
    e, c, bias = (torch.tensor(x, requires_grad=True) for x in (inputs.e, inputs.c, inputs.bias))
    z = e[torch.from_numpy(inputs.rows)] @ c.T + bias
    targets = torch.from_numpy(np.where(keep, inputs.targets[:, 0], -100))
    losses = torch.nn.functional.cross_entropy(z, targets, reduction="none", label_smoothing=smoothing)
    weights = torch.from_numpy(case.upstream.a)
    (losses * weights).sum().backward()

    # loss = (1 - smoothing) (lse - z_target) + smoothing (lse - mean(z))
    inputs = dataclasses.replace(inputs, logit_weight=None)
    out = dense.forward(inputs, case.problem)
    loss = (1 - smoothing) * out.nll[:, 0] + smoothing * (out.lse - out.weighted_logit)
    np.testing.assert_allclose(loss[keep], losses.detach().numpy()[keep], rtol=1e-12)
    a = case.upstream.a * keep
    gradients = dense.backward(
        inputs, case.problem, out, Upstream(a, (1 - smoothing) * a[:, None], None, -smoothing * a)
    )
    np.testing.assert_allclose(gradients.de, e.grad.numpy()[inputs.rows], atol=1e-12)
    np.testing.assert_allclose(gradients.dc, c.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(gradients.dbias, bias.grad.numpy(), atol=1e-12)


def test_entropy_and_prediction_equal_torch(make_case):
    case = make_case(softcap=4.0, seed=2)
    out = dense.forward(case.inputs, case.problem)
    z = torch.from_numpy(dense.logits(case.inputs, case.problem))
    distribution = torch.distributions.Categorical(logits=z)
    np.testing.assert_allclose(out.entropy, distribution.entropy().numpy(), rtol=1e-12)
    np.testing.assert_array_equal(out.prediction, z.argmax(dim=1).numpy())
    np.testing.assert_allclose(out.weighted_logit, (z.numpy() * case.inputs.logit_weight).sum(1), rtol=1e-12)


def _objective(inputs: Inputs, problem: Problem, upstream: Upstream) -> float:
    out = dense.forward(inputs, problem)
    pairs = [(upstream.a - upstream.g.sum(1), out.lse), (upstream.g, out.nll)]
    pairs += [(upstream.h, out.entropy), (upstream.s, out.weighted_logit)]
    return float(sum((weight * x).sum() for weight, x in pairs if weight is not None and x is not None))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("output", ["a", "g", "h", "s", "all"])
def test_gradients_equal_finite_differences(make_case, options, output):
    case = make_case(**{"n": 4, "v": 7, "d": 3, **options})
    inputs, problem, upstream = case.inputs, case.problem, case.upstream
    if output != "all":
        zeroed = {f: np.zeros_like(getattr(upstream, f)) for f in "aghs" if f != output}
        upstream = dataclasses.replace(upstream, **zeroed)
    gradients = dense.backward(inputs, problem, dense.forward(inputs, problem), upstream)
    used = np.arange(problem.n) if inputs.rows is None else inputs.rows
    expected = {"e": gradients.de, "c": gradients.dc, "bias": gradients.dbias}
    for name, gradient in expected.items():
        x = getattr(inputs, name)
        if x is None:
            assert gradient is None
            continue
        numeric = np.zeros_like(x)
        for index in itertools.product(*map(range, x.shape)):
            values = []
            for step in (1e-5, -1e-5):
                moved = x.copy()
                moved[index] += step
                values.append(_objective(dataclasses.replace(inputs, **{name: moved}), problem, upstream))
            numeric[index] = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(gradient, numeric[used] if name == "e" else numeric, atol=3e-8, rtol=1e-7)


def test_only_what_is_asked_for(make_case):
    case = make_case(outputs=())
    out = dense.forward(case.inputs, case.problem)
    assert out.entropy is out.weighted_logit is out.prediction is None
    problem = dataclasses.replace(case.problem, grad_e=False, grad_bias=False)
    gradients = dense.backward(case.inputs, problem, out, case.upstream)
    assert gradients.de is gradients.dbias is None
    assert gradients.dc.shape == case.inputs.c.shape


def test_masked_entries_have_no_probability_and_no_nan(make_case):
    case = make_case(seed=3)
    bias = case.inputs.bias.copy()
    bias[5:17] = -np.inf
    kept = np.isfinite(bias)
    weight = np.where(kept, case.inputs.logit_weight, 0.0)
    targets = np.where(np.isin(case.inputs.targets, np.nonzero(~kept)), 0, case.inputs.targets)
    inputs = dataclasses.replace(case.inputs, bias=bias, logit_weight=weight, targets=targets)
    out = dense.forward(inputs, case.problem)
    gradients = dense.backward(inputs, case.problem, out, case.upstream)
    # The same problem without the masked entries.
    renumber = np.cumsum(kept) - 1
    small = dataclasses.replace(
        inputs,
        c=inputs.c[kept],
        bias=bias[kept],
        logit_weight=weight[kept],
        targets=np.where(targets < 0, -1, renumber[targets]),
    )
    small_problem = dataclasses.replace(case.problem, v=int(kept.sum()))
    small_out = dense.forward(small, small_problem)
    small_gradients = dense.backward(small, small_problem, small_out, case.upstream)
    assert np.isnan(out.weighted_logit).all()  # 0 (-inf), as in PyTorch
    for name in ("lse", "nll", "entropy"):
        np.testing.assert_allclose(getattr(out, name), getattr(small_out, name), rtol=1e-12)
    np.testing.assert_allclose(gradients.de, small_gradients.de, atol=1e-12)
    np.testing.assert_allclose(gradients.dc[kept], small_gradients.dc, atol=1e-12)
    assert not gradients.dc[~kept].any()


def test_a_tie_goes_to_the_first_in_the_vocabulary_order():
    inputs = Inputs(np.ones((1, 1)), np.ones((4, 1)), np.array([[0]]), vocab_order=np.array([2, 0, 3, 1]))
    problem = Problem(1, 4, 1, outputs=frozenset({"prediction"}))
    assert dense.forward(inputs, problem).prediction == 2


def test_refuses_to_round():
    with pytest.raises(TypeError, match="float32, expected float64"):
        dense.forward(Inputs(np.ones((1, 1), np.float32), np.ones((2, 1)), np.array([[0]])), Problem(1, 2, 1))
