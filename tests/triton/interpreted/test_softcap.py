"""A softcap of any size: tanh(y) has a relative error of a few units in the last place, also of a small y."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from calls import SPECS, check, loss_of

from cce.backends.triton.kernels.tiles import tanh

EPS = torch.finfo(torch.float32).eps


@triton.jit
def tanh_kernel(x, out, BLOCK: tl.constexpr):
    where = tl.arange(0, BLOCK)
    tl.store(out + where, tanh(tl.load(x + where)))


def test_tanh() -> None:
    """Over all sizes, to 4 units in the last place; and the ends."""
    sizes = torch.logspace(-30, 2, 2**15)
    x = torch.cat([sizes, -sizes])
    found = torch.empty_like(x)
    tanh_kernel[(1,)](x, found, BLOCK=len(x))
    expected = x.double().tanh()
    assert ((found.double() - expected) / expected).abs().max().item() <= 4 * EPS
    ends, found = torch.tensor([0.0, math.inf, -math.inf, math.nan]), torch.empty(4)
    tanh_kernel[(1,)](ends, found, BLOCK=4)
    assert found[:3].tolist() == [0, 1, -1] and found[3].isnan()


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("name", SPECS)
def test_loss_and_gradients(name: str, softcap: float) -> None:
    rng = torch.Generator().manual_seed(3)
    e, c = torch.randn(6, 8, generator=rng), torch.randn(60, 8, generator=rng)
    targets, bias = torch.randint(60, (6,), generator=rng), torch.randn(60, generator=rng)
    call = loss_of(e, c, targets, bias, spec=SPECS[name], softcap=softcap)
    check(replace(call, upstream=replace(call.upstream, h=torch.linspace(-1, 1, 6))))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_masked_entries(name: str) -> None:
    """A bias of -inf masks an entry, and keeps no logit of -softcap; c may hold anything there."""
    rng = torch.Generator().manual_seed(4)
    e, c = torch.randn(6, 8, generator=rng), torch.randn(40, 8, generator=rng)
    bias = torch.zeros(40).masked_fill(torch.arange(40) % 3 == 0, -math.inf)
    targets = torch.tensor([1, 2, 4, 3, 7, -1])  # of which the fourth is masked
    call = loss_of(e, c, targets, bias, spec=SPECS[name], softcap=2.0)
    check(call)
    found = call.run()
    assert found["nll"][3] == math.inf and not found["dc"][0].any()
