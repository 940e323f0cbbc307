"""Contrastive losses against the whole matrix of similarities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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
        rows.append((others - z[i, (i + b) % m]).logsumexp(0))
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


EDGES: dict[str, dict[str, Any]] = {
    "a large temperature": {"temperature": 1e4},
    "a small temperature": {"temperature": 1e-3},
    "large embeddings": {"normalize": False, "size": 200},
    "an offset": {"normalize": False, "offset": 2.0**10},
    "equal": {"normalize": False, "size": 0, "offset": 1e4},
}


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("block", [1, 3, 4, 256], ids=lambda n: f"block={n}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nt_xent_at_its_edges(
    dtype: torch.dtype, block: int, edge: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Similarities inside a block are hidden whatever they are, and only differences of similarities count."""
    monkeypatch.setattr(contrastive, "_BLOCK", block)
    options: dict[str, Any] = {"temperature": 0.5, "normalize": True, **edge}
    size, offset = options.pop("size", 3), options.pop("offset", None)
    mine = [(size * x.detach()).round().to(dtype) for x in views(4, d=3)]
    for x in mine:
        x[:, 0] = x[:, 0] if offset is None else offset
        x.requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in mine]
    found, expected = losses.nt_xent(*mine, reduction="none", **options), nt_xent(*wide, **options)
    # Differences of similarities of integers are exact; normalized embeddings are rounded to the dtype.
    x = torch.cat([unit(x) if options["normalize"] else x for x in wide]).detach()
    t = options["temperature"]
    eps = torch.finfo(dtype if options["normalize"] else found.dtype).eps
    z = float(((x[:, 1:] if offset else x) ** 2).sum(1).max()) / t
    assert ((found - expected).abs() <= 8 * eps * (1 + z + expected.abs())).all(), f"{found} instead of {expected}"
    shortest = float(torch.cat(wide).detach().norm(dim=1).min()) if options["normalize"] else 1
    steepest = float(x.abs().max()) / t / shortest
    error = 64 * steepest * (torch.finfo(dtype).eps + eps * z)  # of 8 rows
    for g, dense in zip(torch.autograd.grad(found.sum(), mine), torch.autograd.grad(expected.sum(), wide), strict=True):
        assert (g - dense).abs().max() <= error, f"{g} instead of {dense}"


def test_infinite_similarities() -> None:
    """As in a cross-entropy: of the pair, -inf costs inf; of another, -inf costs nothing and inf is NaN."""
    patterns = set()
    for row in ([-torch.inf, 0.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]):
        x = torch.tensor([row, [1.0, 1.0], [2.0, -1.0], [1.0, 0.5], [-1.0, 0.0], [1.0, 3.0]])
        for views in (x, x[[0, 1, 2, 3]], x[[4, 0]]):
            found = losses.nt_xent(*views.chunk(2), normalize=False, reduction="none")
            z = (2 * views @ views.T).fill_diagonal_(-torch.inf)
            expected = F.cross_entropy(z, torch.arange(len(views)).roll(len(views) // 2), reduction="none")
            torch.testing.assert_close(found, expected, equal_nan=True)
            patterns.update(str(y) for y in found.tolist() if not math.isfinite(y) or y > 0)
    assert {"nan", "inf"} < patterns


def test_a_filtered_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only nll is asked for, of which a filter knows the gradient."""
    monkeypatch.setattr(contrastive, "_BLOCK", 4)
    e, c = views(8)
    found, exact = (losses.nt_xent(e, c, spec=cce.Spec(filter=f, threshold=1e-12)) for f in ("element", "none"))
    torch.testing.assert_close(found, exact)


def test_views_of_two_dtypes() -> None:
    """Neither is rounded to the other's."""
    e, c = (x.detach() for x in views(4))
    e, c = e.half(), (1e6 * c).float()
    torch.testing.assert_close(losses.nt_xent(e, c).double(), nt_xent(e.double(), c.double(), 0.5).mean())


@pytest.mark.parametrize("recipe", [losses.clip_contrastive, losses.nt_xent])
def test_embeddings_of_which_the_squares_overflow(recipe: Any) -> None:
    e, c = (x.detach().float() for x in views(4))
    expected = recipe(e, c)
    assert expected > 0
    torch.testing.assert_close(recipe(1e30 * e, 1e25 * c), expected)
    torch.testing.assert_close(recipe(1e-9 * e, 1e-9 * c), expected)


@pytest.mark.parametrize("learned", [False, True])
def test_float16_embeddings_that_are_scaled_beyond_it(learned: bool) -> None:
    e = torch.tensor([[300.0, 1.0], [300.0, -1.0]], dtype=torch.float16)
    scale = torch.tensor(256.0) if learned else 256.0
    assert torch.finfo(torch.float16).max < 300 * 256
    found = losses.clip_contrastive(e, e.flip(0), logit_scale=scale, normalize=False)
    assert found == 512  # the pair's similarity is 2 * 256 below the other's


def test_a_scale_that_is_no_tensor_rounds_nothing() -> None:
    """bfloat16 embeddings are taken as they are."""
    e, c = (x.detach().to(torch.bfloat16) for x in views(6))
    found = losses.clip_contrastive(e, c, logit_scale=1.37, normalize=False)
    z = 1.37 * e.double() @ c.double().T
    expected = (-z.log_softmax(1).diagonal() - z.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_clip_of_equal_similarities(dtype: torch.dtype, scale: float) -> None:
    """log B, whatever they are."""
    e = torch.ones(8, 4, dtype=dtype)
    for s in (scale, torch.tensor(scale, dtype=dtype)):
        found = losses.clip_contrastive(e, e, logit_scale=s, normalize=False)
        torch.testing.assert_close(found, torch.tensor(8.0, dtype=dtype).log())


E = torch.ones(4, 3)
BAD: list[tuple[Any, str, dict[str, Any]]] = [
    (losses.clip_contrastive, "logit_scale", {"logit_scale": 0}),
    (losses.clip_contrastive, "logit_scale", {"logit_scale": torch.ones(1)}),
    *((losses.clip_contrastive, "logit_scale", {"logit_scale": torch.tensor(s)}) for s in (-1.0, 0.0, torch.inf)),
    (losses.clip_contrastive, "logit_scale", {"logit_scale": torch.tensor(torch.nan)}),
    (losses.nt_xent, "temperature", {"temperature": 1e-40}),
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
