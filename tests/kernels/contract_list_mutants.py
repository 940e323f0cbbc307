"""Kernels that do the library's part of the contract wrong in one way each, and the cases that must tell."""

from __future__ import annotations

from dataclasses import replace

import torch

from cce.testing.kernels.plain import PlainKernels


class NoTargets(PlainKernels):
    """The log-sum-exp may be less than a target's logit."""

    def joined(self, splits, target_logits, targets, in_use):
        lse, lse_low, _ = super().joined(splits, target_logits, torch.full_like(targets, -1), in_use)
        nll = (lse[:, None] - target_logits) + lse_low[:, None]
        return lse, lse_low, torch.where((targets >= 0) & in_use[:, None], nll, 0)


class ShiftForgotten(PlainKernels):
    """nll is the difference of two rounded numbers, which may be large."""

    def joined(self, splits, target_logits, targets, in_use):
        lse, lse_low, nll = super().joined(splits, target_logits, targets, in_use)
        return lse, lse_low, torch.where(nll.isfinite() & (nll > 0), lse[:, None] - target_logits, nll)


class NanIsDead(PlainKernels):
    """A tile is live if its quantity exceeds the threshold, which NaN does not."""

    def fill_maps(self, problem, spec, lse, lse_low, in_use, tiles, maps):
        super().fill_maps(problem, spec, lse, lse_low, in_use, tiles, maps)
        maps.tile_mass[:, ~lse.isfinite()] = 0
        return True

    def work_list(self, inputs, problem, spec, rows, maps, upstream):
        maps = replace(maps, tile_mass=maps.tile_mass.nan_to_num())
        return super().work_list(inputs, problem, spec, rows, maps, upstream)


class StrangeGradientsAsOthers(PlainKernels):
    """A row whose gradient is NaN or inf is live where its mass says so."""

    def work_list(self, inputs, problem, spec, rows, maps, upstream):
        a, h = (None if x is None else x.nan_to_num(1.0, 1.0, 1.0) for x in (upstream.a, upstream.h))
        return super().work_list(inputs, problem, spec, rows, maps, replace(upstream, a=a, h=h))


class OneTileAnItem(PlainKernels):
    """Items are of one tile."""

    def plan(self, live, slots, pack):
        return super().plan(live, slots, 1)


class AllRowsCount(PlainKernels):
    """Rows that do not count are sorted with the others."""

    def work_list(self, inputs, problem, spec, rows, maps, upstream):
        inputs = replace(inputs, in_use=torch.ones(problem.n, dtype=torch.bool, device=inputs.targets.device))
        return super().work_list(inputs, problem, spec, rows, maps, upstream)


class TargetsForgotten(PlainKernels):
    """Tiles with a target are live only if their mass is large."""

    def work_list(self, inputs, problem, spec, rows, maps, upstream):
        rows = replace(rows, targets=torch.full_like(rows.targets, -1))
        return super().work_list(inputs, problem, spec, rows, maps, upstream)


class NothingHit(PlainKernels):
    """Masses are not negated."""

    def fill_maps(self, problem, spec, *given):
        super().fill_maps(problem, spec, *given)
        given[-1].tile_mass.abs_()
        return True


class SortedInPlace(PlainKernels):
    """Rows stay where they are."""

    def gather_rows(self, e, row_order, keep, out):
        super().gather_rows(e, row_order.sort()[0], keep, out)

    def scatter_rows(self, spec, total, norm, row_order, keep, out):
        super().scatter_rows(spec, total, norm, row_order.sort()[0], keep, out)


MUTANTS = {
    NoTargets: ["joined", "joined k3"],
    ShiftForgotten: ["joined offset", "joined offset k3"],
    NanIsDead: ["fill_maps strange", "fill_maps tile strange", "work_list strange"],
    StrangeGradientsAsOthers: ["work_list strange"],
    OneTileAnItem: ["plan", "plan one block"],
    AllRowsCount: ["work_list of few", "work_list of parts"],
    TargetsForgotten: ["work_list", "work_list of targets alone"],
    NothingHit: ["fill_maps", "fill_maps tile entropy"],
    SortedInPlace: ["gather_rows", "scatter_rows float32"],
}
