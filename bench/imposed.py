"""Filtered steps whose live tiles are given: what the filter's kernels cost, whatever the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cce import registry
from cce.backends.problem import Gradients, Inputs, Maps, Problem, Upstream
from cce.backends.resolve import resolve
from cce.spec import Spec


def zipf_tiles(tiles: int, blocks: int, fraction: float, device: torch.device) -> Tensor:
    """(T, B) bool: vocabulary block t is live with probability min(1, a / (t + 1)), as in a frequency-sorted one."""
    rank = torch.arange(1, tiles + 1, dtype=torch.float64)
    low, high = 1.0, float(tiles) ** 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle / rank).clamp(max=1).mean()) < fraction else (low, middle)
    chance = (low / rank).clamp(max=1)[:, None].to(device)
    return _drawn(chance.expand(tiles, blocks))


def random_tiles(tiles: int, blocks: int, fraction: float, device: torch.device) -> Tensor:
    """(T, B) bool: every tile is live with the same probability, the worst case for the caches."""
    return _drawn(torch.full((tiles, blocks), fraction, dtype=torch.float64, device=device))


def _drawn(chance: Tensor) -> Tensor:
    generator = torch.Generator(chance.device).manual_seed(1)
    live = torch.rand(chance.shape, generator=generator, device=chance.device, dtype=torch.float64) < chance
    live[0] = True  # where the targets are
    return live


@dataclass(frozen=True)
class Imposed:
    """A forward that fills the maps and a backward that is given others.

    Attributes:
        live_fraction: of all tiles.
        step: one step; the gradients.
        live: (T, B) the tiles.
        lse: (N,) of the rows.
    """

    live_fraction: float
    step: Callable[[], Gradients[Tensor]]
    live: Tensor
    lse: Tensor


def imposed(e: Tensor, c: Tensor, live: Tensor, scratch_bytes: int, backend: str = "triton") -> Imposed:
    """Steps of the mean loss on ``e`` (N, D) and ``c`` (V, D), all targets in the first vocabulary block."""
    n, v = len(e), len(c)
    problem = Problem(
        n=n, v=v, d=e.shape[1], e_dtype=e.dtype, c_dtype=c.dtype, device=e.device.type, grad_e=True, grad_c=True
    )
    spec = resolve(Spec(filter="element", vocab_order="natural", scratch_bytes=scratch_bytes), problem)
    assert spec.block_n is not None and spec.block_v is not None
    chosen = registry.load(backend)
    inputs = Inputs(e, c, torch.arange(n, device=e.device)[:, None] % spec.block_v)
    of_rows = live.repeat_interleave(spec.block_n, 1)[:, :n]
    given = Maps(tile_mass=torch.where(of_rows, -1.0, 0.0).to(problem.map_dtype(spec)))
    weight = torch.full((n,), 1 / n, device=e.device)
    upstream = Upstream(weight, weight[:, None])
    made = Maps(tile_mass=torch.empty(live.shape[0], n, dtype=problem.map_dtype(spec), device=e.device))

    def step() -> Gradients[Tensor]:
        outputs = chosen.forward(inputs, problem, spec, made)
        return chosen.backward(inputs, problem, spec, outputs, given, upstream)

    lse = chosen.forward(inputs, problem, spec, made).lse
    return Imposed(float(live.float().mean()), step, live, lse)


def errors(e: Tensor, c: Tensor, made: Imposed, block_n: int = 128, block_v: int = 128) -> tuple[float, float]:
    """Relative errors of some rows of dE and dC against float64."""
    n, v = len(e), len(c)
    found = made.step()
    assert found.de is not None and found.dc is not None
    rows = torch.arange(0, n, max(1, n // 16), device=e.device)
    targets = torch.arange(n, device=e.device) % block_v
    z = e[rows].double() @ c.double().T
    dz = torch.exp(z - made.lse[rows].double()[:, None])
    dz[torch.arange(len(rows)), targets[rows]] -= 1
    dz *= made.live[:, rows // block_n].T.repeat_interleave(block_v, 1)[:, :v]
    de = dz @ c.double() / n
    t = max(1, made.live.shape[0] // 10)  # without targets
    entries = torch.arange(t * block_v, min(v, (t + 1) * block_v), device=e.device)
    p = torch.exp(e.double() @ c[entries].double().T - made.lse.double()[:, None])
    p *= made.live[t].repeat_interleave(block_n)[:n, None]
    dc = p.T @ e.double() / n
    return float((found.de[rows] - de).norm() / de.norm()), float((found.dc[entries] - dc).norm() / dc.norm())
