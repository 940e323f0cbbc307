"""Contrastive losses against the whole matrix of similarities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cce
from cce import losses
from cce.losses import contrastive

pytestmark = pytest.mark.usefixtures("one_thread")
REDUCE = {"mean": Tensor.mean, "sum": Tensor.sum, "none": lambda x: x}
every_reduction = pytest.mark.parametrize("reduction", list(REDUCE))


def views(b: int, d: int = 5, noise: float = 0.5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rng = torch.Generator().manual_seed(b)
    first = torch.randn(b, d, generator=rng, dtype=torch.float64)
    second = first + noise * torch.randn(b, d, generator=rng, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (first, second)]


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(1, keepdim=True).sqrt()


@every_reduction
@pytest.mark.parametrize("normalize", [True, False])
def test_clip(normalize: bool, reduction: str, same: Any) -> None:
    """Also the gradient of a learned logit scale."""
    e, c = views(13)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    found = losses.clip_contrastive(e, c, logit_scale=scale, normalize=normalize, reduction=reduction)
    z = scale * (unit(e) @ unit(c).T if normalize else e @ c.T)
    each = (-z.log_softmax(1).diagonal() - z.log_softmax(0).diagonal()) / 2
    same(found, REDUCE[reduction](each), [e, c, scale])


def nt_xent(e: Tensor, c: Tensor, temperature: float, normalize: bool = True) -> Tensor:
    """By the paper: a sum over the 2 B - 1 others."""
    x = torch.cat([e, c])
    x = unit(x) if normalize else x
    z = x @ x.T / temperature
    m, b = len(x), len(e)
    rows = []
    for i in range(m):
        others = torch.cat([z[i, :i], z[i, i + 1 :]])
        rows.append(others.logsumexp(0) - z[i, (i + b) % m])
    return torch.stack(rows)


@every_reduction
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("block", [1, 4, 7, 26, 256], ids=lambda n: f"block={n}")
def test_nt_xent(
    block: int, temperature: float, normalize: bool, reduction: str, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one row, of a size that divides 26 or not, and one block that is larger than the batch."""
    monkeypatch.setattr(contrastive, "_BLOCK", block)
    e, c = views(13)
    found = losses.nt_xent(e, c, temperature=temperature, normalize=normalize, reduction=reduction)
    same(found, REDUCE[reduction](nt_xent(e, c, temperature, normalize)), [e, c])


def test_a_pair_alone_finds_its_other_view() -> None:
    e, c = views(1)
    found = losses.nt_xent(e, c, temperature=0.1)
    assert abs(float(found.detach())) < 1e-14
    assert all((x.abs() < 1e-14).all() for x in torch.autograd.grad(found, [e, c]))


def test_a_small_temperature_in_float32(same: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The similarity with itself is exp(50) times the others': it must be left out, not subtracted."""
    monkeypatch.setattr(contrastive, "_BLOCK", 8)
    e, c = views(20, d=64, noise=20.0, dtype=torch.float32)
    found = losses.nt_xent(e, c, temperature=0.02)
    wide = [x.detach().double().requires_grad_() for x in (e, c)]
    expected = nt_xent(*wide, 0.02).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for x, y in zip(torch.autograd.grad(found, [e, c]), torch.autograd.grad(expected, wide), strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns that hide a block are exact in 16 bits; without normalization nothing else is rounded twice."""
    monkeypatch.setattr(contrastive, "_BLOCK", 8)
    e, c = views(20, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (e, c)]
    found = losses.nt_xent(e, c, normalize=False, spec=cce.Spec(filter="none"))
    expected = nt_xent(*wide, 0.5, normalize=False).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for x, y in zip(torch.autograd.grad(found, [e, c]), torch.autograd.grad(expected, wide), strict=True):
        assert (x - y).norm() < 4 * torch.finfo(dtype).eps * y.norm()


E = torch.ones(4, 3)
BAD: list[tuple[Any, str, dict[str, Any]]] = [
    (losses.clip_contrastive, "logit_scale", {"logit_scale": 0}),
    (losses.clip_contrastive, "logit_scale", {"logit_scale": torch.ones(1)}),
    (losses.nt_xent, "temperature", {"temperature": 0}),
    *(
        (recipe, name, {name: value})
        for recipe in (losses.clip_contrastive, losses.nt_xent)
        for name, value in [
            ("e", torch.ones(3)),
            ("e", torch.ones(4, 3, dtype=torch.int64)),
            ("c", torch.ones(5, 3)),
            ("normalize", 1),
            ("reduction", "median"),
            ("softcap", 2.0),
            ("shift", 1),
        ]
    ),
]


@pytest.mark.parametrize(("recipe", "name", "given"), BAD)
def test_bad_input(recipe: Any, name: str, given: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected"):
        recipe(**{"e": E, "c": E, **given})
