"""dC in float16 is in its range, though the product of scaled factors would not be."""

from __future__ import annotations

import pytest
import torch

import cce


@pytest.mark.parametrize("spec", [{"filter": "none"}, {"filter": "none", "scratch_bytes": 2**15}])
def test_sums_of_large_rows(spec: dict[str, object]) -> None:
    """A sum that took weights of 1 instead of 1 / 40 would be 40 times as large."""
    e, c = torch.full((40, 2), 16384.0).half(), torch.zeros(40, 2).half().requires_grad_()
    loss = cce.loss(e, c, torch.arange(40) % 2, backend="triton", spec=cce.Spec(**spec))
    dc = torch.autograd.grad(loss, c)[0].double()
    expected = torch.full_like(dc, 16384 / 40)
    expected[:2] -= 8192
    assert (dc - expected).norm() <= 2.0**-10 * expected.norm()
