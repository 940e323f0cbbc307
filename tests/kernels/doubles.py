"""Stand-ins for kernels on a GPU: right ones that ask the GPU nothing, and ones that do nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.arrays import GradientOfWindow, Live, Sizes
from cce.backends.gpu.kernels import Kernels
from cce.backends.problem import Problem
from cce.spec import Spec
from cce.testing.kernels.plain import PlainKernels, dx_of, logits


class DenseKernels(PlainKernels):
    """All tiles of every chunk at once, the dead ones masked: nothing of the plan is read by the host."""

    def live(self, problem: Problem, spec: Spec, live: Live) -> Callable[[int], None]:
        assert spec.block_n is not None and spec.block_v is not None
        rows = torch.arange(problem.n, device=live.e.device)
        place = torch.arange(problem.v, device=live.e.device)
        block, tile = rows // spec.block_n, place // spec.block_v
        on = _live_tiles(live)  # (T, B)
        order = place if live.order is None else live.order
        e = live.e if live.sorted_rows else live.e[live.row_order]
        keep = live.keep[live.row_order][:, None]
        e, c = torch.where(keep, e.double(), 0), live.c[order].double()
        bias = None if live.formula.bias is None else live.formula.bias[order]
        z = logits(e, c, replace(live.formula, bias=bias))
        dx = dx_of(z, live.rows, live.row_order, place, live.formula.softcap)
        dx = torch.where(keep & on.T[block][:, tile], dx, 0)

        def chunk(k: int) -> None:
            start, end = live.plan.chunk_start[k], live.plan.chunk_start[k + 1]
            here = (tile >= start) & (tile < end)
            mine = torch.where(here, dx, 0)
            rounded = mine.to(live.dz.dtype).double()
            if live.de is not None:
                live.de.add_(rounded @ c)
            width = spec.block_v - torch.where(tile == tile[-1], (-problem.v) % spec.block_v, 0)
            for out, found, share in (
                (live.dc, rounded.T @ e, live.mass_e),
                (live.dbias, mine.sum(0), live.mass),
            ):
                if out is not None:
                    _write(out, order, here, found, None if share is None else share[tile], width, live.norm)

        return chunk


def _write(
    out: Tensor, order: Tensor, here: Tensor, found: Tensor, share: Tensor | None, width: Tensor, norm: Tensor | None
) -> None:
    column = (slice(None), None) if found.ndim == 2 else slice(None)
    if share is not None:
        found = found + share / width[column]
    if norm is not None:
        found = found * norm
    found = found[:, : out.shape[1]] if found.ndim == 2 else found
    out.index_copy_(0, order, torch.where(here[column], found.to(out.dtype), out.index_select(0, order)))


def _live_tiles(live: Live) -> Tensor:
    """(T, B) bool. Of a block's list only the first are told; what follows is another block, or the same again."""
    plan = live.plan
    tiles, blocks = plan.block_list.shape
    told = torch.arange(blocks, device=live.e.device) < plan.live_count[:, None]
    index = torch.where(told, plan.block_list, blocks).long()
    return torch.zeros(tiles, blocks + 1, dtype=torch.bool, device=live.e.device).scatter_(1, index, True)[:, :-1]


class IdleKernels(PlainKernels):
    """No kernel does anything: what is left is the host code's own work."""

    def sizes(self, problem: Problem, spec: Spec) -> Sizes:
        return Sizes(128, 256, 128, 256, 2, 132)

    def target_logits(self, *arguments: Any) -> None:
        """Nothing."""

    def statistics(self, *arguments: Any) -> None:
        """Nothing."""

    def statistics_ahead(self, *arguments: Any) -> None:
        """Nothing."""

    def gradient(self, *arguments: Any) -> GradientOfWindow:
        return lambda *window: None

    mean_rows = Kernels.mean_rows  # the library's
    dead_mass = Kernels.dead_mass
    fill_maps = Kernels.fill_maps
    work_list = Kernels.work_list

    def live(self, *arguments: Any) -> Callable[[int], None]:
        return lambda k: None
