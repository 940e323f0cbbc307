"""Memory that kernels read and write, with guards around it, and the comparison of results."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cce.backends.gpu.sizes import cdiv

_MARGIN = 64  # elements around a result
_POISON = -7_777_777  # of integers; NaN of others


@dataclass
class Results:
    """Results that a kernel writes, as views of larger memory."""

    device: str
    whole: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, pitch: int = 0) -> Tensor:
        """Poisoned; a matrix may have a ``pitch`` beyond its columns."""
        poison = math.nan if dtype.is_floating_point else _POISON
        columns = pitch or shape[-1]
        size = math.prod(shape[:-1]) * columns
        memory = torch.full((size + 2 * _MARGIN,), poison, dtype=dtype, device=self.device)
        view = memory[_MARGIN : _MARGIN + size].view(*shape[:-1], columns)[..., : shape[-1]]
        self.whole[name] = (memory, view)
        return view

    def overruns(self) -> list[str]:
        """Results around which something was written."""
        found = []
        for name, (memory, view) in self.whole.items():
            rest = memory.clone()
            rest.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(memory[0].item())
            clean = rest.isnan() if rest.is_floating_point() else rest == _POISON
            if not bool(clean.all()):
                found.append(f"{name}: written outside, {int((~clean).sum())} elements")
        return found


def operand(x: Tensor) -> Tensor:
    """An aligned copy: D padded with zeros, a longer pitch, and NaN in all that nobody may read."""
    unit = 16 // x.element_size()
    width = cdiv(x.shape[1], unit) * unit
    memory = x.new_full(((len(x) + 2) * (width + unit) + unit,), torch.nan)
    view = memory[unit:].view(len(x) + 2, width + unit)[1:-1, :width]
    view[:, x.shape[1] :] = 0
    view[:, : x.shape[1]] = x
    return view


def compare(name: str, found: Tensor, expected: Tensor, tolerance: float) -> list[str]:
    """Faults of a result: the relative norm of its difference exceeds the tolerance."""
    found, expected = found.double().cpu(), expected.double().cpu()
    odd = ~torch.isfinite(expected)
    differ = (found != expected) & ~(found.isnan() & expected.isnan()) & odd
    if bool(differ.any()):
        return [f"{name}: where {expected[differ][0]} was expected, {int(differ.sum())} differ"]
    if bool(odd.all()):
        return [f"{name}: no number is expected, so that nothing is compared"]
    found, expected = torch.where(odd, 0, found), torch.where(odd, 0, expected)
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if error <= tolerance:
        return []
    gap = (found - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    wrong = float((gap > 4 * tolerance * (expected.abs() + expected.abs().mean())).double().mean())
    strange = int((~torch.isfinite(found)).sum())
    return [
        f"{name}: relative error {error:.2g} > {tolerance:.1g}; {wrong:.0%} wrong, {strange} not finite, "
        f"worst at {worst} of {tuple(gap.shape)}: {found[worst]:.5g}, expected {expected[worst]:.5g}"
    ]


def surrounded(x: Tensor) -> Tensor:
    """The same numbers, one after the other in a row, with NaN between the rows: neither aligned nor padded."""
    wide = x.new_full((len(x) + 1, x.shape[1] + 3), math.nan)
    wide[1:, 1:-2] = x
    return wide[1:, 1:-2]
