"""dx in rows of dC that later chunks write, as little scratch memory makes it: the same gradients as ever."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

import cce
from cce.backends.gpu import lent

pytestmark = pytest.mark.gpu
N, D, V = 1000, 256, 20_000
#: A threshold that every tile exceeds; in another order, rows of dC are written anywhere, and none is lent.
SPECS = {
    "exact": {"filter": "none"},
    "filtered": {"filter": "element", "threshold": 2.0**-60, "vocab_order": "natural"},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", SPECS)
def test_against_float64(kind: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def told(*args: object) -> list[lent.Stretch]:
        found = lent.stretches(*args)  # type: ignore[arg-type]
        seen.append(len(found))
        return found

    module = import_module(f"cce.backends.gpu.{kind}")
    monkeypatch.setattr(module, "stretches", told)
    rng = torch.Generator("cuda").manual_seed(0)
    e, c, bias = (torch.randn(*s, generator=rng, device="cuda").to(dtype) for s in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N,), generator=rng, device="cuda")
    targets[::5] = -100
    leaves = [x.requires_grad_() for x in (e, c, bias)]
    spec = cce.Spec(scratch_bytes=N * 300 * dtype.itemsize, **SPECS[kind])  # type: ignore[arg-type]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(cce.loss(e, c, targets, bias, backend=backend, spec=spec), leaves)

    found, again = gradients(), gradients()
    assert min(seen) > 1
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*wide), targets), wide)
    plain = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), targets), leaves)
    for x, same, y, z in zip(found, again, expected, plain, strict=True):
        assert torch.equal(x, same)
        assert (x.double() - y).norm() <= 2 * (z.double() - y).norm() + 1e-6 * y.norm()
