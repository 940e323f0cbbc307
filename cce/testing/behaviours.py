"""Behaviours that users of a PyTorch loss rely on, checked through ``cce.loss`` and ``cce.terms`` on any backend.

Each function takes a backend's name and a device and raises AssertionError with what went wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cce

Behaviour = Callable[[str, str], None]
N, D, V = 48, 32, 193
_EXACT = cce.Spec(filter="none")


def _data(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    e = torch.randn(N, D, generator=rng).to(device, dtype).requires_grad_()
    c = torch.randn(V, D, generator=rng).to(device, dtype).requires_grad_()
    return e, c, torch.randint(V, (N,), generator=rng).to(device)


def _near(x: Tensor, y: Tensor, what: str, tolerance: float = 2e-5) -> None:
    x, y = x.detach().double(), y.detach().double()
    error = float((x - y).norm() / y.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}"


def _dense(e: Tensor, c: Tensor, t: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(F.linear(e.double(), c.double()), t, **options)  # type: ignore[arg-type]


def same_bits_every_run(backend: str, device: str) -> None:
    """Losses and gradients of repeated runs are bitwise equal, filtered and not."""
    for spec in (_EXACT, cce.Spec(filter="element", threshold=1e-3)):
        e, c, t = _data(device)
        runs = []
        for _ in range(5):
            loss = cce.loss(e, c, t, backend=backend, spec=spec)
            runs.append([loss, *torch.autograd.grad(loss, (e, c))])
        for other in runs[1:]:
            assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True)), f"bits differ under {spec}"


def second_backward(backend: str, device: str) -> None:
    """A retained graph gives the same gradients again, and one multiplied by a number that many times as much."""
    for spec in (_EXACT, cce.Spec(filter="element")):
        e, c, t = _data(device)
        loss = cce.loss(e, c, t, backend=backend, spec=spec)
        first = torch.autograd.grad(loss, (e, c), retain_graph=True)
        second = torch.autograd.grad(loss, (e, c), retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True)), "the second backward differs"
        for graph in (loss, cce.loss(e, c, t, backend=backend, spec=spec)):
            third = torch.autograd.grad(-3 * graph, (e, c))
            for name, x, y in zip(("dE", "dC"), third, first, strict=True):
                _near(x, -3 * y, f"{name} of -3 times the loss")


def second_derivative(backend: str, device: str) -> None:
    """Asking for one is an error that names the alternative, not a wrong number."""
    for reduction in ("mean", "none"):
        e, c, t = _data(device)
        loss = cce.loss(e, c, t, reduction=reduction, backend=backend, spec=_EXACT).sum()
        de = torch.autograd.grad(loss, e, create_graph=True)[0]
        message = "nothing was raised"
        try:
            torch.autograd.grad(de.square().sum(), c)
        except RuntimeError as error:
            message = str(error)
        assert "torch.nn.functional.cross_entropy" in message, f"{reduction}: {message}"


def per_token_gradients(backend: str, device: str) -> None:
    """``reduction="none"`` with a gradient of its own for each token."""
    e, c, t = _data(device)
    w = torch.linspace(-1, 2, N, device=device)
    found = torch.autograd.grad(cce.loss(e, c, t, reduction="none", backend=backend, spec=_EXACT), (e, c), w)
    expected = torch.autograd.grad(_dense(e, c, t, reduction="none"), (e, c), w.double())
    for name, x, y in zip(("dE", "dC"), found, expected, strict=True):
        _near(x, y, name)


def ignored_rows(backend: str, device: str) -> None:
    """Ignored rows give 0, no gradient, and take no part in the mean; a row of NaN may hide behind one."""
    e, c, t = _data(device)
    with torch.no_grad():
        e[5] = torch.nan
    t[5], t[7:20] = -100, -100
    loss = cce.loss(e, c, t, backend=backend, spec=_EXACT)
    de, dc = torch.autograd.grad(loss, (e, c))
    kept = t != -100
    expected = _dense(e[kept], c, t[kept])
    _near(loss, expected, "loss")
    want_e, want_c = torch.autograd.grad(expected, (e, c))
    _near(de[kept], want_e[kept], "dE")
    _near(dc, want_c, "dC")
    assert bool((de[~kept] == 0).all()), "an ignored row has a gradient"
    out = cce.terms(e, c, t, backend=backend)
    assert out.nll is not None and out.prediction is not None
    assert bool((out.nll[~kept] == 0).all()) and bool((out.prediction[~kept] == -1).all()), "outputs of ignored rows"


def ignored_rows_under_a_filter(backend: str, device: str) -> None:
    """They take no place among the rows that share tiles: the gradients are those of a call without them."""
    e, c, _ = _data(device)
    t = torch.arange(N, device=device) * 4  # four rows to a tile
    with torch.no_grad():
        e.copy_(c[t] / 3)
    t[1::5] = -100
    kept = t != -100
    for order in ("live", "natural"):
        spec = cce.Spec(filter="element", threshold=0.05, block_n=16, block_v=16, row_order=order)
        de, dc = torch.autograd.grad(cce.loss(e, c, t, backend=backend, spec=spec), (e, c))
        alone = cce.loss(e[kept], c, t[kept], backend=backend, spec=spec)
        live = [cce.live_fraction(e[rows], c, t[rows], backend=backend, spec=spec) for rows in (kept | True, kept)]
        assert live[0] == live[1] <= 1, f"live_fraction, row order {order}: {live[0]}, without ignored rows {live[1]}"
        want_e, want_c = torch.autograd.grad(alone, (e, c))
        _near(de, want_e, f"dE, row order {order}")
        _near(dc, want_c, f"dC, row order {order}")


def all_rows_ignored(backend: str, device: str) -> None:
    """The sum over ignored rows is 0, the mean NaN, and the gradients are 0, as in PyTorch."""
    e, c, t = _data(device)
    t.fill_(-100)
    loss = cce.loss(e, c, t, reduction="sum", backend=backend)
    de, dc = torch.autograd.grad(loss, (e, c))
    assert loss.item() == 0 and not de.any() and not dc.any(), "something is left of ignored rows"
    mean = cce.loss(e, c, t, backend=backend)
    assert bool(mean.isnan()), "the mean over nothing is not NaN"
    de, dc = torch.autograd.grad(mean, (e, c))
    assert not de.any() and not dc.any(), "the mean over nothing has gradients"
    for reduction in ("mean", "sum"):
        for upstream in (torch.nan, torch.inf):
            loss = cce.loss(e, c, t.fill_(-100), backend=backend, reduction=reduction, spec=_EXACT)
            found = torch.autograd.grad(loss, (e, c), torch.full_like(loss, upstream))
            assert not any(x.count_nonzero() for x in found), f"{reduction}, an upstream gradient of {upstream}: not 0"


def shift_is_slicing(backend: str, device: str) -> None:
    """``shift=s`` equals slicing both arguments."""
    e, c, t = _data(device)
    e3, t2 = e.view(3, 16, D), t.view(3, 16)
    for shift in (1, 5):
        found = cce.loss(e3, c, t2, shift=shift, reduction="none", backend=backend, spec=_EXACT)
        expected = cce.loss(e3[:, :-shift], c, t2[:, shift:], reduction="none", backend=backend, spec=_EXACT)
        assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        _near(found, expected, "loss")
        pairs = (torch.autograd.grad(x.square().sum(), (e, c)) for x in (found, expected))
        for name, x, y in zip(("dE", "dC"), *pairs, strict=True):
            _near(x, y, name)


def frozen_inputs(backend: str, device: str) -> None:
    """A frozen argument gets no gradient, and the other one the same as ever."""
    e, c, t = _data(device)
    de, dc = torch.autograd.grad(cce.loss(e, c, t, backend=backend, spec=_EXACT), (e, c))
    only_e = torch.autograd.grad(cce.loss(e, c.detach(), t, backend=backend, spec=_EXACT), e)[0]
    only_c = torch.autograd.grad(cce.loss(e.detach(), c, t, backend=backend, spec=_EXACT), c)[0]
    _near(only_e, de, "dE with frozen c")
    _near(only_c, dc, "dC with frozen e")


def no_grad_mode(backend: str, device: str) -> None:
    """Without gradients the same loss, and no graph."""
    e, c, t = _data(device)
    with torch.no_grad():
        loss = cce.loss(e, c, t, backend=backend)
    assert not loss.requires_grad
    _near(loss, _dense(e, c, t), "loss")


def never_negative(backend: str, device: str) -> None:
    """A target with p = 1 has a loss of at least 0, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        e, c, t = _data(device, dtype)
        with torch.no_grad():
            e.copy_(c[t] * 8)
        out = cce.terms(e, c, t, outputs=("nll", "entropy"), backend=backend)
        assert out.nll is not None and out.entropy is not None
        assert bool((out.nll >= 0).all()) and bool((out.entropy >= 0).all()), "a negative loss or entropy"


def common_offset(backend: str, device: str) -> None:
    """Logits that all share a number give the loss and gradients of those without it, smoothed and weighted too."""
    rng = torch.Generator().manual_seed(3)
    # Whole numbers: products and sums have no error, and the offset's last bit is no fraction of one.
    e, c = (torch.randint(-2, 3, (rows, D), generator=rng).float().to(device) for rows in (N, V))
    t, weight = torch.randint(V, (N,), generator=rng).to(device), torch.linspace(0.5, 1.5, V, device=device)
    calls: tuple[dict[str, Any], ...] = (
        {},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.2, "weight": weight},
    )
    for offset in (2.0**10, -(2.0**17), 2.0**23):
        e[:, -1], c[:, -1] = offset, 1.0
        for call in calls:
            x, y = e.clone().requires_grad_(), c.clone().requires_grad_()
            loss = cce.loss(x, y, t, backend=backend, spec=_EXACT, **call)
            expected = _dense(x, y, t, **{k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()})
            where = f"at {offset:g}, {', '.join(call) or 'mean'}"
            _near(loss, expected, f"loss {where}")
            found, want = (torch.autograd.grad(value.sum(), (x, y)) for value in (loss, expected))
            for name, ours, theirs in zip(("dE", "dC"), found, want, strict=True):
                # The last column holds sums that are 0, and multiples of the offset.
                _near(ours[:, :-1], theirs[:, :-1], f"{name} {where}")
    for offset in (1e4, 1e8):
        equal = torch.full((1, 1), offset, device=device), torch.ones(2, 1, device=device), torch.zeros_like(t[:1])
        _near(cce.loss(*equal, backend=backend), torch.tensor(2.0).log(), f"loss of two equal logits of {offset:g}")


def bad_target(backend: str, device: str) -> None:
    """A target outside [0, V) is a ValueError that names it (on a GPU it would end the process: not run there)."""
    if device != "cpu":
        return
    e, c, t = _data(device)
    for bad in (V, -1, 2**40):
        t[3] = bad
        message = "nothing was raised"
        try:
            cce.loss(e, c, t, backend=backend)
        except ValueError as error:
            message = str(error)
        assert str(bad) in message, f"target {bad}: {message}"


def autocast(backend: str, device: str) -> None:
    """Under autocast the inputs are rounded as F.linear's are, and float32 leaves get float32 gradients."""
    e, c, t = _data(device)
    with torch.autocast(device, torch.bfloat16):
        loss = cce.loss(e, c, t, backend=backend, spec=_EXACT)
    de, dc = torch.autograd.grad(loss, (e, c))
    assert de.dtype == dc.dtype == torch.float32
    rounded = _dense(e.bfloat16(), c.bfloat16(), t)
    _near(loss, rounded, "loss")
    for name, x, y in zip(("dE", "dC"), (de, dc), torch.autograd.grad(rounded, (e, c)), strict=True):
        _near(x, y, name, tolerance=2e-2)


def compiled(backend: str, device: str) -> None:
    """``torch.compile(fullgraph=True)`` with a dynamic number of rows gives the eager numbers."""
    e, c, t = _data(device)

    def step(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
        out = cce.terms(e, c, t, outputs=("nll", "entropy"), softcap=5.0, backend=backend)
        assert out.nll is not None and out.entropy is not None
        return out.nll.sum() + out.entropy.mean() + cce.loss(e, c, t, z_loss=1e-3, label_smoothing=0.1, backend=backend)

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (N, 17, 31):
        rows = e.detach()[:n].requires_grad_()
        want = torch.autograd.grad(step(rows, c, t[:n]), (rows, c))
        found = torch.autograd.grad(fast(rows, c, t[:n]), (rows, c))
        for name, x, y in zip(("dE", "dC"), found, want, strict=True):
            _near(x, y, name)


BEHAVIOURS: tuple[Behaviour, ...] = (
    same_bits_every_run,
    second_backward,
    second_derivative,
    per_token_gradients,
    ignored_rows,
    ignored_rows_under_a_filter,
    all_rows_ignored,
    shift_is_slicing,
    frozen_inputs,
    no_grad_mode,
    never_negative,
    common_offset,
    bad_target,
    autocast,
    compiled,
)
