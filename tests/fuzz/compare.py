"""Whether results are as near to the formula as their arithmetic can come, and have NaN and inf where it has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from noise import UNDERFLOW, UNIT, Noise
from torch import Tensor

#: Of the scatter of the disturbed formula. The disturbances are already three times what rounding does at most times.
FACTOR = 2.0
#: Disturbed evaluations: few at first, and more before anything is called a failure.
DRAWS = (1, 4, 40)


def compare(
    found: Mapping[str, Tensor], formula: Callable[[Noise], dict[str, Tensor]], noise: Callable[..., Noise]
) -> list[str]:
    """What is wrong, a line for each quantity.

    Args:
        found: values and gradients.
        formula: the same in float64, by the noise given.
        noise: makes one, with a generator or without.
    """
    plain = noise()
    exact = formula(plain)
    most = torch.finfo(torch.float32).max ** 0.8  # products of larger numbers overflow, and float32 gradients of them
    if plain.peak > most:
        return []
    least = 2.0**10 * UNDERFLOW[plain.results]  # smaller numbers are flushed to 0 on the way
    failures, open_ = [], {}
    for name, x in found.items():
        reference = exact[name]
        if x.shape != reference.shape:
            failures.append(f"{name}: got shape {tuple(x.shape)}, expected {tuple(reference.shape)}")
        else:
            open_[name] = torch.zeros(_rows(reference).shape[0], dtype=torch.float64)
    # A gradient that overflows in float64, too, is inf or NaN, as its terms are added.
    unsure = {name: (exact[name].abs() > most) & (torch.isfinite(exact[name]) | (name[0] == "d")) for name in open_}
    drawn, left = 0, {name: _wrong(name, found[name], exact[name], open_[name] + least, unsure[name]) for name in open_}
    for draws in DRAWS:
        left = {name: text for name, text in left.items() if text}
        if not left:
            return failures
        for _ in range(draws):
            drawn += 1
            disturbed = formula(noise(torch.Generator().manual_seed(drawn)))
            for name in left:
                difference, reference = disturbed[name], exact[name]
                unsure[name] |= torch.isfinite(difference) != torch.isfinite(reference)
                off = torch.where(difference == reference, 0, difference - reference)
                off = torch.where(torch.isfinite(off), off, 0)
                open_[name] = torch.maximum(open_[name], _rows(off).norm(dim=1))
        left = {name: _wrong(name, found[name], exact[name], open_[name] + least, unsure[name]) for name in left}
    return failures + [text for text in left.values() if text]


def _rows(x: Tensor) -> Tensor:
    """Rows of a matrix, numbers of a vector."""
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 and x.numel() else x.reshape(-1, 1)


def _wrong(name: str, x: Tensor, exact: Tensor, scatter: Tensor, unsure: Tensor) -> str:
    """What is wrong with ``x``, or ""."""
    dtype, x = x.dtype, x.double()
    # Near the largest number of its dtype a result may or may not overflow; its error may bring it there.
    reach = (_rows(exact).abs() + FACTOR * scatter[:, None]).view(exact.shape)
    unsure = unsure | (torch.isfinite(exact) & (reach > torch.finfo(dtype).max / 2))
    pattern = _kind(x) != _kind(exact)
    if bool((pattern & ~unsure).any()):
        at = tuple((pattern & ~unsure).nonzero()[0].tolist())
        return f"{name}: {x[at].item()} at {at}, expected {exact[at].item()}; {int(pattern.sum())} such places"
    off = torch.where(unsure | ~torch.isfinite(exact), 0, x - exact)
    error, size = _rows(off).norm(dim=1), _rows(torch.where(torch.isfinite(exact), exact, 0)).norm(dim=1)
    stored = UNIT[dtype] * size + 2 * UNDERFLOW[dtype] * _rows(exact).shape[1] ** 0.5
    allowed = FACTOR * scatter + 2 * stored
    if bool((error <= allowed).all()):
        return ""
    row = int((error / allowed).argmax())
    times = f"{error[row] / allowed[row]:.2g} times what is allowed"
    everything = f"all of it by {error.norm():.3g} of {size.norm():.3g}"
    return f"{name}: row {row} is off by {error[row]:.3g} of {size[row]:.3g}, {times}; {everything}"


def _kind(x: Tensor) -> Tensor:
    """0 of numbers, 1 of NaN, 2 and 3 of inf and -inf."""
    return torch.isnan(x).long() + 2 * torch.isposinf(x) + 3 * torch.isneginf(x)
