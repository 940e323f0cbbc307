"""The kernels' contract (cce/backends/gpu/kernels.py), word by word in PyTorch: slow, float64 inside, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cce.backends.gpu.arrays import DeadMass, Dense, Formula, GradientOfWindow, Live, Rows, Sizes, Tiles, Window
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.library import Ahead
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.gpu.work import Work
from cce.backends.problem import LEAST_HIT, Inputs, Maps, Problem, Upstream
from cce.spec import Spec
from cce.testing.kernels.plain_math import describe, dx_of, join, logits, logits_of_targets

SIZES = Sizes(forward_rows=32, forward_columns=64, gradient_rows=32, gradient_columns=64, pack=2, programs=4)


class PlainKernels(Kernels):
    """The oracle of all other kernels.

    Args:
        sizes: of its tiles; by default those of :data:`SIZES`, wider where a block is.
    """

    def __init__(self, sizes: Sizes | None = None) -> None:
        self._sizes = sizes

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        return []

    def sizes(self, problem: Problem, spec: Spec) -> Sizes:
        if self._sizes is not None:
            return self._sizes
        columns = max(SIZES.forward_columns, spec.block_v or 0) if problem.maps(spec) else SIZES.forward_columns
        return Sizes(SIZES.forward_rows, columns, SIZES.gradient_rows, SIZES.gradient_columns, SIZES.pack, 4)

    def one_pass(self) -> OnePassKernels:
        from cce.testing.kernels.plain_one_pass import PlainOnePass

        return PlainOnePass()

    def target_logits(self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor) -> None:
        out.copy_(logits_of_targets(e, c, targets, formula))

    def statistics(self, problem: Problem, spec: Spec, window: Window) -> None:
        e, c, formula, weight, first = window.e, window.c, window.formula, window.weight, window.first
        splits, tiles = window.splits, window.tiles
        width = self.sizes(problem, spec).forward_columns
        count, number = -(-len(c) // width), len(splits.max)
        z = logits(e, c, formula)
        for s in range(number):
            v0, v1 = s * count // number * width, min(len(c), (s + 1) * count // number * width)
            u = None if weight is None else weight[v0:v1]
            join(splits, s, z[:, v0:v1], u, first + v0, carry=first > 0)
        if tiles is None:
            return
        assert spec.block_v is not None
        for v0 in range(0, len(c), spec.block_v):
            describe(tiles, (first + v0) // spec.block_v, z[:, v0 : v0 + spec.block_v])

    def gathers_ahead(self, problem: Problem) -> bool:
        return True

    def statistics_ahead(self, problem: Problem, spec: Spec, window: Window, ahead: Ahead) -> None:
        """Gather first: nobody may still read the place where the rows go."""
        ahead.out.copy_(ahead.c[ahead.order])
        self.statistics(problem, spec, window)

    def gradient(self, problem: Problem, spec: Spec, dense: Dense) -> GradientOfWindow:
        everyone = torch.arange(len(dense.e), device=dense.e.device)

        def window(c: Tensor, first: int, dz: Tensor, column_sums: Tensor | None) -> None:
            here = slice(first, first + len(c))
            bias, u = (None if x is None else x[here] for x in (dense.formula.bias, dense.weight))
            z = logits(dense.e, c, replace(dense.formula, bias=bias))
            places = first + torch.arange(len(c), device=c.device)
            dx = dx_of(z, dense.rows, everyone, places, dense.formula.softcap, u)
            dz.copy_(dx)
            if column_sums is not None:
                for i, block in enumerate(dx.split(self.sizes(problem, spec).gradient_rows)):
                    column_sums[i] = block.sum(0)

        return window

    def mean_rows(self, problem: Problem, spec: Spec, c: Tensor, order: Tensor | None, out: Tensor) -> None:
        assert spec.block_v is not None
        rows = c if order is None else c[order]
        for t, block in enumerate(rows.split(spec.block_v)):
            out[t] = block.double().mean(0)

    def dead_mass(self, problem: Problem, spec: Spec, mass: DeadMass) -> bool:
        rows, maps, row_order, live = mass.rows, mass.maps, mass.row_order, mass.live
        first, out = mass.first, mass.out
        assert maps.tile_mass is not None and spec.block_n is not None and spec.block_v is not None
        p = maps.tile_mass[first : first + len(out), row_order].double().clamp(min=0)
        log_p = p.log().clamp(min=-1e4)
        total = p * rows.a[row_order].double()
        if rows.h is not None:
            assert rows.entropy is not None and maps.tile_entropy is not None
            gap = maps.tile_entropy[first : first + len(out), row_order].double() - log_p
            total = total + p * rows.h[row_order].double() * (gap - rows.entropy[row_order].double())
        if problem.softcap is not None:
            blocks = torch.arange(first, first + len(out), device=p.device)
            width = (problem.v - blocks * spec.block_v).clamp(max=spec.block_v).double()
            zbar = log_p + rows.lse[row_order].double() - width.log()[:, None]
            total = total * (1 - (zbar / problem.softcap).clamp(-1, 1).square())
        block = torch.arange(problem.n, device=p.device) // spec.block_n
        out.copy_(torch.where(live[first : first + len(out), block], 0.0, total))
        return True

    def live(self, problem: Problem, spec: Spec, live: Live) -> Callable[[int], None]:
        return LiveTiles(problem, spec, live).chunk

    def fill_maps(
        self,
        problem: Problem,
        spec: Spec,
        lse: Tensor,
        lse_low: Tensor,
        in_use: Tensor,
        tiles: Tiles,
        maps: Maps[Tensor],
    ) -> bool:
        assert maps.tile_mass is not None and spec.threshold is not None
        count = len(maps.tile_mass)
        log_max = (tiles.max[:count].double() - lse.double()) - lse_low.double()
        log_mass = log_max + tiles.log_sum[:count].double()
        dead = (log_max if spec.filter == "element" else log_mass) <= math.log(spec.threshold)
        mass = torch.where(dead, log_mass.exp(), -log_mass.exp().clamp(min=LEAST_HIT))
        maps.tile_mass.copy_(torch.where(in_use, mass, 0))
        if maps.tile_entropy is not None and tiles.entropy is not None:
            maps.tile_entropy.copy_(torch.where(in_use, tiles.entropy[:count], 0))
        return True

    def work_list(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        rows: Rows,
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Work:
        assert maps.tile_mass is not None and spec.block_n is not None and spec.block_v is not None
        hit = ~(maps.tile_mass >= 0)
        tiles, n = hit.shape
        everyone = torch.arange(n, device=hit.device)
        keep, everywhere = upstream.a != 0, ~upstream.a.isfinite()
        for k in range(problem.k):
            wanted = upstream.g[:, k] != 0
            keep |= wanted
            target = rows.targets[:, k]
            tile = (target.clamp(min=0) // spec.block_v).long()
            hit[tile, everyone] |= wanted & (target >= 0)
        if upstream.h is not None:
            keep |= upstream.h != 0
            everywhere |= ~upstream.h.isfinite()
        hit |= everywhere
        hit &= keep
        counts = (inputs.targets >= 0).any(1) if inputs.in_use is None else inputs.in_use
        by_count = spec.row_order == "live" and spec.block_n > 1
        order = torch.where(counts, hit.sum(0) if by_count else 0, tiles + 1).argsort(stable=True)
        live = torch.stack([hit[:, block].any(1) for block in order.split(spec.block_n)], 1)
        return Work(order, keep, live)


class LiveTiles:
    """A filtered backward: reads the plan as the kernels would, each table for what it is there for."""

    def __init__(self, problem: Problem, spec: Spec, live: Live) -> None:
        assert spec.block_n is not None and spec.block_v is not None
        self.problem, self.live = problem, live
        self.block_n, self.block_v = spec.block_n, spec.block_v
        tables = {name: x for name, x in vars(live.plan).items() if isinstance(x, Tensor)}
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in tables.values())
        self.plan = {name: x.tolist() for name, x in tables.items()}

    def chunk(self, k: int) -> None:
        for item in range(self.plan["items"][k]):
            block, first, slot, count = (
                self.plan[f"item_{name}"][k][item] for name in ("block", "first", "slot", "tiles")
            )
            for nth in range(count):
                self._dx(block, self.plan["tile_list"][block][first + nth], slot + nth)
        if self.live.de is not None:
            for block in range(len(self.plan["tile_list"])):
                self._de(k, block)
        for t in range(self.plan["chunk_start"][k], self.plan["chunk_start"][k + 1]):
            self._entries(t)

    def _places(self, t: int) -> Tensor:
        v1 = min(len(self.live.c), (t + 1) * self.block_v)
        return torch.arange(t * self.block_v, v1, device=self.live.e.device)

    def _entries_of(self, t: int) -> Tensor:
        place = self._places(t)
        return place if self.live.order is None else self.live.order[place]

    def _rows_of(self, block: int) -> tuple[Tensor, Tensor]:
        """Indices of a block's rows, and these rows of ``e``, 0 where nothing is wanted."""
        mine = slice(block * self.block_n, min(self.problem.n, (block + 1) * self.block_n))
        index = self.live.row_order[mine]
        e = self.live.e[mine] if self.live.sorted_rows else self.live.e[index]
        return index, torch.where(self.live.keep[index][:, None], e.double(), 0.0)

    def _dx(self, block: int, t: int, slot: int) -> None:
        live = self.live
        (index, e), entries = self._rows_of(block), self._entries_of(t)
        bias = None if live.formula.bias is None else live.formula.bias[entries]
        z = logits(e, live.c[entries], Formula(bias, live.formula.scale, live.formula.softcap, live.formula.ieee))
        dx = dx_of(z, live.rows, index, self._places(t), live.formula.softcap)
        dx = torch.where(live.keep[index][:, None], dx, 0.0)
        live.dz[slot].zero_()
        live.dz[slot, : len(index), : len(entries)] = dx.to(live.dz.dtype)
        if live.column_sums is not None:
            live.column_sums[slot, : len(entries)] = dx.sum(0)

    def _de(self, k: int, block: int) -> None:
        assert self.live.de is not None
        first, slot = self.plan["block_first"][k][block], self.plan["block_slot"][k][block]
        index, _ = self._rows_of(block)
        total = self.live.de[block * self.block_n :][: len(index)]
        for nth in range(self.plan["block_tiles"][k][block]):
            entries = self._entries_of(self.plan["tile_list"][block][first + nth])
            dx = self.live.dz[slot + nth, : len(index), : len(entries)].double()
            total += dx @ self.live.c[entries].double()

    def _entries(self, t: int) -> None:
        """Rows of dC and of dbias."""
        live, entries = self.live, self._entries_of(t)
        norm = 1.0 if live.norm is None else live.norm.double()
        dc = torch.zeros(len(entries), live.e.shape[1], dtype=torch.float64, device=live.e.device)
        dbias = torch.zeros(len(entries), dtype=torch.float64, device=live.e.device)
        for nth in range(self.plan["live_count"][t]):
            block, slot = self.plan["block_list"][t][nth], self.plan["slot_list"][t][nth]
            index, e = self._rows_of(block)
            dc += live.dz[slot, : len(index), : len(entries)].double().T @ e
            if live.column_sums is not None:
                dbias += live.column_sums[slot, : len(entries)]
        if live.dc is not None:
            if live.mass_e is not None:
                dc += live.mass_e[t].double() / len(entries)
            live.dc[entries] = (norm * dc[:, : live.dc.shape[1]]).to(live.dc.dtype)
        if live.dbias is not None:
            if live.mass is not None:
                dbias += live.mass[t].double() / len(entries)
            live.dbias[entries] = (norm * dbias).float()
