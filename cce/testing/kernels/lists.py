"""The part of the contract that a library fulfils as well: work list, plan, rows in its order, maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula, Rows, Splits, Tiles, Window
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.library import Ahead
from cce.backends.gpu.sizes import cdiv
from cce.backends.problem import Inputs, Maps, Problem, Upstream
from cce.backends.shared.worklist import target_positions
from cce.spec import Spec
from cce.testing.kernels.case import Case
from cce.testing.kernels.plain import PlainKernels
from cce.testing.kernels.plain_math import joined
from cce.testing.kernels.plans import NOBODY, make_plan, random_live, random_maps
from cce.testing.kernels.results import Results, compare


class Lists:
    """Checks of the lists of a random case (see ``contract.Bench``). A method returns the faults of its kernel."""

    kernels: Kernels
    plain: PlainKernels
    case: Case
    device: str
    problem: Problem
    spec: Spec
    dtype: torch.dtype
    e: Tensor
    c: Tensor
    rng: torch.Generator

    def plan(self) -> list[str]:
        """Every table, in all that it tells, for scratch memory of three sizes."""
        assert self.spec.block_n is not None
        tiles, blocks = self.spec.tiles(self.case.v), cdiv(self.case.n, self.spec.block_n)
        density, pack, faults = self.case.density, self.case.pack, []
        live = (
            random_live(tiles, blocks, density, self.rng)
            if 0 < density < 1
            else torch.full((tiles, blocks), bool(density))
        )
        for slots in (2 * blocks, 2 * blocks + 3, self.case.slots or 10_000):
            found, expected = self.kernels.plan(live.to(self.device), slots, pack), make_plan(live, slots, pack)
            if (found.chunks, found.max_items) != (expected.chunks, expected.max_items):
                faults.append(f"{found.chunks} chunks of {found.max_items}, {expected.chunks} of {expected.max_items}")
                continue
            for name, x in vars(expected).items():
                if isinstance(x, Tensor):
                    y = getattr(found, name)
                    told = x != NOBODY
                    same = y.is_contiguous() and y.shape == x.shape and torch.equal(y.cpu()[told], x[told])
                    faults += [] if same and y.dtype == torch.int32 else [f"{name}, {slots} slots"]
        return faults

    def work_list(self) -> list[str]:
        case, n = self.case, self.case.n
        spec = self.spec if case.sorted_rows else Spec(**{**vars_of(self.spec), "row_order": "natural"})
        inputs, upstream = self._call()
        maps = random_maps(self.problem, spec, self.device, self.rng)
        assert maps.tile_mass is not None
        if case.density < 0.2:  # few rows hit a tile
            maps.tile_mass.abs_()
            maps.tile_mass[:, ::17] *= -1
        if case.density == 0:
            maps.tile_mass.abs_()
        if case.strange:
            maps.tile_mass[:, 7::9] = torch.nan
        places = target_positions(inputs).to(torch.int32).contiguous()
        rows = Rows(upstream.a, upstream.a, upstream.a, upstream.g, places, None, upstream.h, None)
        found = self.kernels.work_list(inputs, self.problem, spec, rows, maps, upstream)
        expected = self.plain.work_list(inputs, self.problem, spec, rows, maps, upstream)
        faults = []
        for name in ("row_order", "keep", "live"):
            mine, other = getattr(found, name), getattr(expected, name)
            if not (torch.equal(mine, other) and mine.dtype == other.dtype and mine.is_contiguous()):
                faults.append(f"{name}: differs")
        if found.row_of is not None:
            row_of = torch.where(expected.keep[expected.row_order], expected.row_order, -1).to(torch.int32)
            faults += [] if torch.equal(found.row_of, row_of) else ["row_of: differs"]
        return faults if len(found.row_order) == n else [*faults, "row_order: too short"]

    def _call(self) -> tuple[Inputs[Tensor], Upstream[Tensor]]:
        """Targets of which some are none, rows that do not count, gradients of which some are 0."""
        case, n, rng = self.case, self.case.n, self.rng
        targets = torch.randint(-1, case.v, (n, case.k), generator=rng)
        targets[-1, -1] = case.v - 1
        targets[2::5] = -1
        a, g = torch.randn(n, generator=rng), torch.randn(n, case.k, generator=rng)
        a[::3], g[::3], g[1::4, -1] = 0, 0, 0
        h = None
        if "entropy" in case.outputs:
            h = torch.zeros(n)
            h[::6] = 1
        if case.strange:
            a[4::9], g[5::9, 0] = torch.nan, torch.nan
            if h is not None:
                h[6::9] = torch.inf
        order = torch.randperm(case.v, generator=rng).to(self.device) if case.ordered else None
        e, c = torch.zeros(n, 1, device=self.device), torch.zeros(case.v, 1, device=self.device)
        in_use = torch.rand(n, generator=rng) < 0.8 if case.nan_rows else None
        inputs = Inputs(
            e, c, targets.to(self.device), vocab_order=order, in_use=None if in_use is None else in_use.to(self.device)
        )
        to = self.device
        return inputs, Upstream(a.to(to), g.to(to), None if h is None else h.to(to))

    def gather_rows(self) -> list[str]:
        """Some of the rows, those not wanted NaN."""
        case, n = self.case, self.case.n
        keep = torch.rand(n, generator=self.rng) < 0.7
        e = torch.randn(n, case.d, generator=self.rng)
        e[~keep] = torch.nan
        e = self.operand(e)  # type: ignore[attr-defined]
        whole = self.operand(torch.randn(n, case.d, generator=self.rng))  # type: ignore[attr-defined]
        keep, order = keep.to(self.device), torch.randperm(n, generator=self.rng).to(self.device)[n // 3 :]
        found = Results(self.device)
        out = found.new("rows", (len(order), e.shape[1]), self.dtype)
        self.kernels.gather_rows(e, order, keep, out)
        every = found.new("every row", out.shape, self.dtype)
        self.kernels.gather_rows(whole, order, None, every)
        expected = torch.where(keep[order][:, None], e[order], 0)
        faults = [*compare("rows", out, expected, 0), *compare("every row", every, whole[order], 0)]
        return [*found.overruns(), *faults]

    def scatter_rows(self) -> list[str]:
        case, n = self.case, self.case.n
        total = torch.full((n, cdiv(case.d, 8) * 8), torch.nan)
        total[:, : case.d] = torch.randn(n, case.d, generator=self.rng)
        norm = torch.tensor(0.5, device=self.device) if case.norm else None
        order = torch.randperm(n, generator=self.rng).to(self.device)
        found, total = Results(self.device), total.to(self.device)[:, : case.d]
        expected = torch.empty(n, case.d, device=self.device)
        expected[order] = total if norm is None else total * norm
        keep = (torch.rand(n, generator=self.rng) < 0.7).to(self.device)
        expected[~keep] = 0
        total[~keep[order]] = torch.nan
        out = found.new("rows", (n, case.d), self.dtype)
        self.kernels.scatter_rows(self.spec, total, norm, order, keep, out)
        return [*found.overruns(), *compare("rows", out, expected.to(self.dtype), 0)]

    def statistics_ahead(self) -> list[str]:
        """The bits of the statistics are those of a call that gathers nothing."""
        case, n, kernels = self.case, self.case.n, self.kernels
        if not kernels.gathers_ahead(self.problem):
            return []
        e, c = self.operand(self.e), self.operand(self.c)  # type: ignore[attr-defined]
        order = torch.randperm(case.v, generator=self.rng).to(self.device)[: case.v - 3]
        found, results = Results(self.device), []
        rows = found.new("rows", (len(order), c.shape[1]), self.dtype)
        for ahead in (None, Ahead(c, order, rows)):
            top, total = (torch.zeros(case.splits, n, device=self.device) for _ in range(2))
            splits = Splits(top, total, None, None, None)
            given = self.problem, self.spec, Window(e, c, Formula(None, 1.0, None, True), None, 0, splits, None)
            kernels.statistics(*given) if ahead is None else kernels.statistics_ahead(*given, ahead)
            results.append(torch.stack((top, total)))
        faults = [] if torch.equal(*results) else ["splits: other bits"]
        return [*faults, *found.overruns(), *compare("rows", rows, c[order], 0)]

    def joined(self) -> list[str]:
        """Splits of which some saw nothing but -inf, rows of it alone, NaN in either number, targets' logits beyond."""
        case, n = self.case, self.case.n

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.rng).to(self.device)

        offset = torch.zeros(n, device=self.device)
        offset[::2] = case.offset
        top, total = 30 * draw(case.splits, n), draw(case.splits, n).abs() + 1
        top = (top.round() if case.offset else top) + offset
        empty = draw(case.splits, n) < -1
        empty[:, 3::13] = True
        top[empty], total[empty] = -torch.inf, 0
        top[0, 5::17], total[0, 5::17] = torch.nan, torch.nan
        if case.strange:
            total[0, 6::17] = torch.nan  # of a maximum that leaves NaN out
            top[0, 7::17], total[0, 7::17] = -torch.inf, torch.nan
            top[0, 8::17], total[0, 8::17] = torch.inf, torch.nan
        targets = torch.randint(-1, 2, (n, case.k), generator=self.rng).to(self.device)
        named, in_use = (30 * draw(n, case.k)).round() + offset[:, None], draw(n) < 1
        named[9::11] = -torch.inf
        offset = torch.where(in_use, offset, 0)
        expected = joined(top, total, named, targets, in_use)
        found = self.kernels.joined(Splits(top, total, None, None, None), named, targets, in_use)
        faults = [] if found[2].shape == (n, case.k) else ["nll: another shape"]
        # Of a row with an infinite maximum and a sum of NaN, inf and NaN say the same.
        lse, of_plain = (torch.where(x[0] == torch.inf, torch.nan, x[0]) for x in (found, expected))
        faults += compare("lse", lse, of_plain, 1e-6)
        whole, of_plain = (x[0].double() + x[1].double() - offset for x in (found, expected))
        faults += compare("lse + lse_low", whole, of_plain, 1e-6)
        return faults + compare("nll", found[2], expected[2], 1e-6)

    def fill_maps(self) -> list[str]:
        """The masses to some units in the last place; which are hit, and entropies, exactly."""
        case, n, tiles = self.case, self.case.n, self.spec.tiles(self.case.v)
        assert self.spec.threshold is not None

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.rng).to(self.device)

        offset = torch.zeros(n, device=self.device)
        offset[::2] = case.offset
        top, log_sum = 6 * draw(tiles + 1, n), draw(tiles + 1, n).abs()  # as many as whole tiles of the forward have
        top = (top.round() if case.offset else top) + offset
        empty = torch.zeros(tiles + 1, n, dtype=torch.bool, device=self.device)
        empty[::7], empty[:, 2::11] = True, True
        top[empty], log_sum[empty] = -torch.inf, 0
        lse = (top[:tiles].double().amax(0) + draw(n).abs()).float()
        low = torch.where(lse.isfinite(), 2.0**-26 * lse.abs() * draw(n).clamp(-1, 1), torch.nan)
        if case.strange:
            top[1, 3::11], log_sum[1, 3::11], lse[3::11], low[3::11] = torch.nan, torch.nan, torch.nan, torch.nan
            top[1, 4::11], log_sum[1, 4::11], lse[4::11], low[4::11] = torch.inf, torch.nan, torch.inf, torch.nan
        entropy = draw(tiles + 1, n).abs() if "entropy" in case.outputs else None
        in_use = draw(n) < 1
        log_max = (top[:tiles].double() - lse.double()) - low.double()
        log_mass = log_max + log_sum[:tiles].double()
        dead = (log_max if case.filter == "element" else log_mass) <= math.log(self.spec.threshold)
        hit, mass = ~dead & in_use, torch.where(dead, log_mass.exp(), -log_mass.exp().clamp(min=2.0**-24))
        mass = torch.where(in_use, mass, 0)
        found, half = Results(self.device), self.problem.map_dtype(self.spec)
        pitch = n + 5
        out = Maps(
            found.new("mass", (tiles, n), half, pitch),
            None if entropy is None else found.new("entropy", (tiles, n), half, pitch),
        )
        given = Tiles(top, log_sum, None if entropy is None else entropy.clone())
        if not self.kernels.fill_maps(self.problem, self.spec, lse, low, in_use, given, out):
            return []  # the library's then
        assert out.tile_mass is not None
        told = ~mass.isnan()  # of a row without a softmax no mass is told, but all its blocks are hit
        tolerance = 2.0 * torch.finfo(half).eps
        faults = [*found.overruns(), *compare("mass", out.tile_mass[told], mass[told], tolerance)]
        if not torch.equal(~(out.tile_mass >= 0), hit):
            faults.append("mass: other rows and tiles are hit")
        if out.tile_entropy is not None and entropy is not None:
            faults += compare("entropy", out.tile_entropy, torch.where(in_use, entropy[:tiles], 0).to(half), 0)
        return faults


def vars_of(spec: Spec) -> dict[str, Any]:
    """The fields to make another one from."""
    return {name: value for name, value in vars(spec).items() if name not in ("key", "permutation")}
