"""The exact backward with the rows in several parts, as little scratch memory makes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import cce
from cce.backends.triton import exact

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_against_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    row_parts = exact.row_parts

    def told(call: object) -> int:
        seen.append(row_parts(call))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(exact, "row_parts", told)
    n, d, v = 5000, 128, 3000
    rng = torch.Generator("cuda").manual_seed(0)
    e, c, bias = (torch.randn(*s, generator=rng, device="cuda").to(dtype) for s in ((n, d), (v, d), (v,)))
    targets = torch.randint(v, (n,), generator=rng, device="cuda")
    targets[::5] = -100
    leaves = [x.requires_grad_() for x in (e, c, bias)]
    spec = cce.Spec(filter="none", scratch_bytes=n * 256 * dtype.itemsize)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(cce.loss(e, c, targets, bias, backend="triton", spec=spec), leaves)

    found, again = gradients(), gradients()
    assert set(seen) == {4}
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*wide), targets), wide)
    plain = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), targets), leaves)
    for x, same, y, z in zip(found, again, expected, plain, strict=True):
        assert torch.equal(x, same)
        assert (x.double() - y).norm() <= 2 * (z.double() - y).norm() + 1e-6 * y.norm()
