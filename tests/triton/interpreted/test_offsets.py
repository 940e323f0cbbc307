"""All logits of a row share an offset: of all results but the log-sum-exp only differences count."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import SPECS, Call, dense, loss_of
from torch import Tensor

OFFSETS = [0.0, 1e4, 1e6, 1e8]
EPS = torch.finfo(torch.float32).eps
WAYS = [*SPECS, "one pass"]


@pytest.mark.parametrize("options", [{}, {"logit_scale": 3.0}, {"softcap": 1e12}], ids=str)
@pytest.mark.parametrize("offset", [*OFFSETS, -1e8])
@pytest.mark.parametrize("name", WAYS)
def test_equal_logits(name: str, offset: float, options: dict[str, float]) -> None:
    if name == "one pass" and "softcap" in options:
        pytest.skip("it takes no softcap")
    call = loss_of(torch.full((1, 1), offset), torch.ones(2, 1), torch.tensor([0]), spec=SPECS.get(name), **options)
    found = call.run()
    assert found["nll"].item() == pytest.approx(math.log(2), abs=4 * EPS)
    # dE is a sum of +- 1/2 times 1: nothing is left.
    assert found["de"].abs().item() <= 4 * EPS * options.get("logit_scale", 1.0)


def shifted(offset: float, columns: int, spec: str) -> Call:
    """Logits with 8 bits after the point, which any offset here but 1e8 leaves as they are."""
    rng = torch.Generator().manual_seed(2)
    n, shared = 5, torch.full((5, 1), offset)
    e = torch.cat([torch.randint(-8, 9, (n, 3), generator=rng) / 4, shared], 1)
    c = torch.cat([torch.randint(-8, 9, (columns, 3), generator=rng) / 4, torch.ones(columns, 1)], 1)
    targets = torch.randint(columns, (n,), generator=rng)
    call = loss_of(e, c, targets, spec=SPECS.get(spec))
    if spec == "one pass":
        return call
    return replace(call, upstream=replace(call.upstream, h=torch.linspace(-1, 1, n)))


@pytest.mark.parametrize("offset", [1e4, 1e6, -1e6])
@pytest.mark.parametrize("columns", [2, 70])
@pytest.mark.parametrize("name", WAYS)
def test_offset_of_exact_logits(name: str, columns: int, offset: float) -> None:
    """As without it, to the accuracy that float32 has of the logits' differences."""
    call, plain = shifted(offset, columns, name), shifted(0.0, columns, name)
    found, expected = call.run(), dense(plain)
    for key in ("nll", "entropy"):
        if key in found:
            assert torch.allclose(found[key].double(), expected[key], rtol=64 * EPS, atol=16 * EPS), key
    # The part of the gradients that the offset does not enter.
    assert torch.allclose(found["de"].double(), expected["de"], rtol=64 * EPS, atol=64 * EPS)
    assert torch.allclose(found["dc"][:, :3].double(), expected["dc"][:, :3], rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("name", SPECS)
def test_pair(name: str) -> None:
    """lse + lse_low is the log-sum-exp to twice float32's digits."""
    found = shifted(1e6, 70, name).run()
    total = found["lse"].double() + found["lse_low"].double()
    expected = dense(shifted(1e6, 70, name))["lse"]
    assert torch.allclose(total, expected, rtol=0, atol=16 * EPS)
    assert (found["lse_low"].abs() <= found["lse"].abs() * EPS).all()


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("name", ["filtered", "filtered by mass, online"])
def test_masses(name: str, offset: float) -> None:
    """The map holds each block's softmax mass, whatever maximum its sums were taken about."""
    maps = shifted(offset, 70, name).forward()[1]
    assert maps.tile_mass is not None
    call = shifted(0.0, 70, name)
    p = (call.inputs.e.double() @ call.inputs.c.double().T).softmax(1)
    p = torch.nn.functional.pad(p, (0, 80 - 70))
    assert torch.allclose(maps.tile_mass.abs().double().T, p.view(5, 5, 16).sum(2), rtol=64 * EPS, atol=0)


def test_backward_without_the_low_part() -> None:
    """None stands for 0."""
    call = shifted(0.0, 70, "exact")
    outputs, maps, spec = call.forward()
    zero = replace(outputs, lse_low=torch.zeros_like(outputs.lse))
    found, expected = (call.backward(x, maps, spec) for x in (replace(outputs, lse_low=None), zero))
    assert torch.equal(found.de, expected.de) and torch.equal(found.dc, expected.dc)


@pytest.mark.parametrize("name", SPECS)
def test_confident_tokens(name: str) -> None:
    """p near 1: what is left of 1 - p has float32's absolute accuracy, whatever the size of the logits."""
    gap = torch.tensor([1.0, 4.0, 8.0, 12.0, 16.0])
    e = torch.stack([gap, torch.full((5,), 1000.0)], 1)
    call = loss_of(e, torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.zeros(5, dtype=torch.int64), spec=SPECS[name])
    found, expected = call.run(), dense(call)
    assert torch.allclose(found["nll"].double(), expected["nll"], rtol=4 * EPS, atol=EPS)
    assert torch.allclose(found["de"][:, 0].double(), expected["de"][:, 0], rtol=4 * EPS, atol=2 * EPS)


@pytest.mark.parametrize("name", WAYS)
def test_target_above_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logit comes from another kernel: by a rounding above the log-sum-exp, its loss is 0; p is as it was."""
    from cce.backends.triton.launches import TritonKernels
    from cce.backends.triton.one_pass import TritonOnePass

    call = shifted(0.0, 70, name)
    raised = torch.tensor([[1e3], [0.0], [0.0], [0.0], [0.0]])
    kernels = TritonOnePass if name == "one pass" else TritonKernels
    original = kernels.target_logits

    def target_logits(self: Any, e: Tensor, c: Tensor, targets: Tensor, formula: Any, out: Tensor, *rest: Any) -> None:
        original(self, e, c, targets, formula, out, *rest)
        out.add_(raised)

    monkeypatch.setattr(kernels, "target_logits", target_logits)
    plain = dense(call)
    found = call.run()
    assert found["nll"][0] == 0
    assert torch.allclose(found["lse"].double(), plain["lse"], rtol=16 * EPS)
    assert torch.allclose(found["nll"][1:].double(), plain["nll"][1:], atol=16 * EPS)
