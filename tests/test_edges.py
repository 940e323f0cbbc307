"""What callers do at the edges: sequences too short for a shift, odd dtypes of targets, numbers too large, aliases."""

from __future__ import annotations

import re
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce

N, D, V = 6, 4, 30


def operands() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    e, c = (torch.randn(*size, generator=rng, requires_grad=True) for size in ((N, D), (V, D)))
    return e, c, torch.randint(V, (N,), generator=rng)


@pytest.mark.parametrize("shift", [1, 2, 2**40])
@pytest.mark.parametrize("length", [0, 1])
def test_a_shift_beyond_the_sequence(length: int, shift: int) -> None:
    """Nothing is predicted: as F.cross_entropy of no row."""
    e, c = torch.randn(2, length, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.zeros(2, length, dtype=torch.long)
    assert cce.loss(e, c, targets, shift=shift, reduction="none").shape == (2, 0)
    assert cce.loss(e, c, targets, shift=shift).isnan()
    total = cce.loss(e, c, targets, shift=shift, reduction="sum")
    total.backward()
    assert total == 0 and e.grad is not None and c.grad is not None and not e.grad.any() and not c.grad.any()
    assert cce.terms(e, c, targets, shift=shift).prediction.shape == (2, 0)  # type: ignore[union-attr]
    weight = torch.ones(2, length, 3)
    assert cce.loss(e, c, targets[..., None].expand(2, length, 3), shift=shift, target_weight=weight).isnan()


def test_nothing_to_predict_and_no_gradient_for_e() -> None:
    """The gradient of c alone waits for the backward, whose upstream gradient is NaN."""
    e, c = torch.randn(1, 1, 3), torch.randn(4, 3, requires_grad=True)
    loss = cce.loss(e, c, torch.zeros(1, 1, dtype=torch.long), shift=1, reduction="sum")
    (found,) = torch.autograd.grad(loss, c, torch.tensor(torch.nan))
    assert not found.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16])
@pytest.mark.parametrize("shift", [0, 1])
def test_targets_of_any_integer_dtype(dtype: torch.dtype, shift: int) -> None:
    e, c, targets = operands()
    expected = cce.loss(e[None], c, targets[None], shift=shift)
    assert torch.equal(cce.loss(e[None], c, targets[None].to(dtype), shift=shift), expected)
    with pytest.raises(ValueError, match=r"^targets: got 30 at index \(0, 0\), expected values in \[0, 30\)"):
        cce.loss(e[:1], c, torch.tensor([V]).to(dtype))


def test_a_target_beyond_int64_is_not_one_below_0() -> None:
    e, c, _ = operands()
    wrapped = torch.from_numpy(np.array([2**64 - 100], dtype=np.uint64))
    with pytest.raises(ValueError, match=rf"^targets: got {2**63 - 1} at index \(0, 0\)"):
        cce.loss(e[:1], c, wrapped)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("filter", ["none", "element"])
def test_the_weight_of_an_ignored_token_is_not_looked_at(reduction: str, filter: str) -> None:
    e, c, targets = operands()
    targets[2] = -100
    weights = torch.linspace(0.5, 2, N)
    spec = cce.Spec(filter=filter, threshold=1e-6)
    found = []
    for value in (7.0, torch.nan):
        weights[2] = value
        weight = weights.clone().requires_grad_()
        loss = cce.loss(e, c, targets, token_weight=weight, reduction=reduction, spec=spec)
        found.append((loss, *torch.autograd.grad(loss.sum(), (e, c, weight))))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("name", "value"), [("logit_scale", 1e39), ("softcap", 1e39), ("softcap", 1e-39)])
def test_numbers_that_float32_does_not_hold(name: str, value: float) -> None:
    e, c, targets = operands()
    with pytest.raises(
        ValueError, match=rf"^{name}: got {re.escape(str(value))}, expected a number from 1.18e-38 to 3.4e\+38"
    ):
        cce.loss(e, c, targets, **{name: value})  # type: ignore[arg-type]
    assert cce.loss(e.double(), c.double(), targets, **{name: value}).isfinite()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["tensor", "array", "stride"])
def test_a_spec_keeps_its_own_order(kind: str) -> None:
    """Whatever the caller does to the tensor that it was made from."""
    e, c, targets = operands()
    order = torch.randperm(V)
    mine = torch.stack([order, order], 1)[:, 0] if kind == "stride" else order.clone()
    spec = cce.Spec(filter="element", threshold=1e-6, block_v=16, vocab_order=mine.numpy() if kind == "array" else mine)
    expected = torch.autograd.grad(cce.loss(e, c, targets, spec=spec), c)[0]
    mine.fill_(0)
    assert torch.equal(spec.permutation, order)
    assert torch.equal(torch.autograd.grad(cce.loss(e, c, targets, spec=spec), c)[0], expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_for_a_bias_alone(reduction: str) -> None:
    e, c, targets = operands()
    bias = torch.randn(V, requires_grad=True)
    loss = cce.loss(e.detach(), c.detach(), targets, bias, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, bias, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        (grad.square().sum() + bias.square().sum()).backward()


def test_a_block_beyond_the_rows_takes_no_memory() -> None:
    e, c, targets = operands()
    spec = cce.Spec(filter="element", threshold=1e-6, block_n=2**40, block_v=2)
    tracemalloc.start()
    found = torch.autograd.grad(cce.loss(e, c, targets, spec=spec), c)[0]
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    torch.testing.assert_close(found, torch.autograd.grad(F.cross_entropy(e @ c.T, targets), c)[0])


@pytest.mark.parametrize("fields", [{"vocab_order": [0, 0]}, {"block_n": 2**70}])
def test_a_spec_is_checked(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^Spec\."):
        cce.Spec(**fields)  # type: ignore[arg-type]


def test_a_key_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^key: got 'junk'"):
        cce.Spec.from_key("junk")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_smoothing_of_float64_is_float64(backend: str) -> None:
    """Also with float32 class weights, which float64 logits are multiplied with."""
    e, c, targets = (x.double() if x.is_floating_point() else x for x in operands())
    weight = torch.rand(V)
    found = cce.loss(e, c, targets, weight=weight, label_smoothing=0.3, backend=backend)
    expected = F.cross_entropy(e @ c.T, targets, weight.double(), label_smoothing=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_a_spec_is_shown_in_a_line() -> None:
    """Also in the refusal of a backend: not the whole permutation."""
    spec = cce.Spec(filter="element", vocab_order=torch.randperm(1000))
    assert "vocab_order=<a permutation of 1000 entries>" in repr(spec) and len(repr(spec)) < 300
    assert repr(cce.Spec()).startswith("Spec(block_n=None, ")
