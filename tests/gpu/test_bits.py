"""The same bits every run, where many programs run at once and in any order."""

from __future__ import annotations

import pytest
import torch
from heads import peaked

import cce

pytestmark = pytest.mark.gpu

SPECS = {
    "exact": cce.Spec(filter="none", scratch_bytes=2**24),
    "natural": cce.Spec(filter="element", vocab_order="natural"),
    "ordered": cce.Spec(filter="element"),
    "uncompensated": cce.Spec(filter="tile", threshold=2.0**-10, compensate=False),
    "one-pass": cce.Spec(filter="none", scratch_bytes=2**28),
}


@pytest.mark.parametrize("rows", [512, 1024])
@pytest.mark.parametrize("name", SPECS)
def test_same_bits(backend: str, name: str, rows: int) -> None:
    head = peaked(rows, 256, 32_768)
    e, c = head.leaves()
    bias = torch.zeros(len(c), device="cuda", dtype=c.dtype, requires_grad=True)
    first = None
    for i in range(100):
        loss = cce.loss(e, c, head.targets, bias, backend=backend, spec=SPECS[name])
        found = [loss.detach(), *torch.autograd.grad(loss, (e, c, bias))]
        first = first or found
        for what, x, y in zip(("loss", "dE", "dC", "dbias"), first, found, strict=True):
            assert torch.equal(x, y), f"{what} of run {i}"
        # Memory another run has left behind would give the same again.
        torch.empty(2**24, device="cuda").fill_(torch.nan)
