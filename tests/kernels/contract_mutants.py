"""Kernels that are wrong in one way each, and the cases of the contract that must tell."""

from __future__ import annotations

from dataclasses import replace

import torch
from contract_list_mutants import MUTANTS as LIST_MUTANTS

from cce.testing.kernels.plain import PlainKernels, logits

LOG2E = 1.4426950408889634


class FirstWindowOnly(PlainKernels):
    """Each window begins anew."""

    def statistics(self, problem, spec, window):
        super().statistics(problem, spec, replace(window, first=0, tiles=None))


class LastColumnDropped(PlainKernels):
    """The last column of a window counts for nothing."""

    def statistics(self, problem, spec, window):
        c, formula = window.c, window.formula
        bias = torch.zeros(len(c), device=c.device) if formula.bias is None else formula.bias.clone()
        bias[-1] = -torch.inf
        super().statistics(problem, spec, replace(window, formula=replace(formula, bias=bias)))


class LastOfTies(PlainKernels):
    """The prediction is the last of the largest logits."""

    def statistics(self, problem, spec, window):
        super().statistics(problem, spec, window)
        splits = window.splits
        if splits.best is not None:
            z = logits(window.e, window.c, window.formula)
            last = window.first + len(window.c) - 1 - z.flip(1).argmax(1)
            splits.best.copy_(torch.where(splits.max == z.amax(1).float(), last, splits.best))


class RoundedSums(PlainKernels):
    """Column sums of the dx that was stored."""

    def gradient(self, problem, spec, dense):
        right = super().gradient(problem, spec, dense)

        def window(c, first, dz, column_sums):
            right(c, first, dz, column_sums)
            if column_sums is not None:
                for i, block in enumerate(dz.float().split(self.sizes(problem, spec).gradient_rows)):
                    column_sums[i] = block.sum(0)

        return window


class PlacesFromZero(PlainKernels):
    """Targets are counted from the window's first column."""

    def gradient(self, problem, spec, dense):
        kernels = super()

        def window(c, first, dz, column_sums):
            bias, weight = (None if x is None else x[first:] for x in (dense.formula.bias, dense.weight))
            moved = replace(dense, formula=replace(dense.formula, bias=bias), weight=weight)
            kernels.gradient(problem, spec, moved)(c, 0, dz, column_sums)

        return window


class OneTarget(PlainKernels):
    """Of a row's targets the first alone is looked at."""

    def gradient(self, problem, spec, dense):
        return super().gradient(problem, spec, replace(dense, rows=first_target(dense.rows)))

    def live(self, problem, spec, live):
        return super().live(problem, spec, replace(live, rows=first_target(live.rows)))


class WholePitch(PlainKernels):
    """Rows of dz are stored with what lies between them."""

    def gradient(self, problem, spec, dense):
        right = super().gradient(problem, spec, dense)

        def window(c, first, dz, column_sums):
            right(c, first, dz, column_sums)
            dz.as_strided((len(dz), dz.stride(0)), dz.stride())[:, dz.shape[1] :] = 0

        return window


class KeepIgnored(PlainKernels):
    """Every row wants a gradient."""

    def live(self, problem, spec, live):
        return super().live(problem, spec, replace(live, keep=torch.ones_like(live.keep)))


class OrderIgnored(PlainKernels):
    """The vocabulary has none."""

    def live(self, problem, spec, live):
        return super().live(problem, spec, replace(live, order=None))


class DeOverwritten(PlainKernels):
    """dE is not added to what is there."""

    def live(self, problem, spec, live):
        if live.de is not None:
            live.de.zero_()
        return super().live(problem, spec, live)


class FirstOfAnItem(PlainKernels):
    """Of the tiles of an item the first alone is computed."""

    def live(self, problem, spec, live):
        plan = replace(live.plan, item_tiles=torch.ones_like(live.plan.item_tiles))
        live.dz.zero_()
        return super().live(problem, spec, replace(live, plan=plan))


class NoCompensation(PlainKernels):
    """What stands for dead tiles is left out."""

    def live(self, problem, spec, live):
        return super().live(problem, spec, replace(live, mass_e=None, mass=None))


class NormForgotten(PlainKernels):
    """dC is not multiplied by the norm."""

    def live(self, problem, spec, live):
        return super().live(problem, spec, replace(live, norm=None))


class SoftcapForgotten(PlainKernels):
    """Logits are not capped."""

    def target_logits(self, e, c, targets, formula, out):
        super().target_logits(e, c, targets, replace(formula, softcap=None), out)

    def live(self, problem, spec, live):
        return super().live(problem, spec, replace(live, formula=replace(live.formula, softcap=None)))


class RestForgotten(PlainKernels):
    """The log-sum-exp is one number."""

    def joined(self, splits, target_logits, targets, in_use):
        lse, lse_low, nll = super().joined(splits, target_logits, targets, in_use)
        return lse, lse_low * 0, nll

    def gradient(self, problem, spec, dense):
        return super().gradient(problem, spec, replace(dense, rows=without_rest(dense.rows)))

    def live(self, problem, spec, live):
        return super().live(problem, spec, replace(live, rows=without_rest(live.rows)))


class RoundedExponents(PlainKernels):
    """exp(z - m) by a multiply-add of z and the product of m, which is rounded."""

    def statistics(self, problem, spec, window):
        super().statistics(problem, spec, window)
        splits, tiles = window.splits, window.tiles
        for m, s in ((splits.max, splits.sum), *([(tiles.max, tiles.log_sum)] if tiles else [])):
            base = m.double() * LOG2E
            error = torch.exp2(base.float().double() - base)
            s.copy_(torch.where(s.isfinite() & m.isfinite(), s * error.nan_to_num(), s))


class MaskCapped(PlainKernels):
    """A softcap makes -softcap of -inf."""

    def target_logits(self, e, c, targets, formula, out):
        super().target_logits(e, c, targets, finite_bias(formula), out)

    def statistics(self, problem, spec, window):
        super().statistics(problem, spec, replace(window, formula=finite_bias(window.formula)))


class TanhByExponentials(PlainKernels):
    """A capped logit errs by the softcap's last place."""

    def target_logits(self, e, c, targets, formula, out):
        super().target_logits(e, c, targets, replace(formula, softcap=None), out)
        power = torch.exp(out * (2 / formula.softcap))
        out.copy_(formula.softcap - 2 * formula.softcap / (1 + power))


class ZeroWeightsLeftOut(PlainKernels):
    """Of entries whose weight is 0 the weighted sum hears nothing."""

    def statistics(self, problem, spec, window):
        super().statistics(problem, spec, window)
        splits = window.splits
        if splits.weighted is not None:
            splits.weighted.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)


def first_target(rows):
    return replace(rows, targets=rows.targets[:, :1], g=rows.g[:, :1])


def without_rest(rows):
    return replace(rows, lse_low=rows.lse_low * 0)


def finite_bias(formula):
    return formula if formula.bias is None else replace(formula, bias=formula.bias.clamp(min=-1e30))


MUTANTS = {
    **LIST_MUTANTS,
    FirstWindowOnly: ["statistics maps windows", "statistics windows", "statistics windows masked"],
    LastColumnDropped: ["statistics", "statistics maps tile", "statistics one class"],
    LastOfTies: ["statistics ties"],
    RoundedSums: ["gradient", "gradient everything"],
    PlacesFromZero: ["gradient", "gradient masked k3"],
    OneTarget: ["gradient masked k3", "live nan rows", "live everything"],
    WholePitch: ["gradient"],
    KeepIgnored: ["live nan rows"],
    OrderIgnored: ["live ordered", "live sorted ordered"],
    DeOverwritten: ["live", "live dead", "live only de"],
    FirstOfAnItem: ["live", "live only dbias", "live dense one chunk"],
    NoCompensation: ["live dead", "live only dc", "live only dbias"],
    NormForgotten: ["live float16 norm"],
    RestForgotten: ["joined offset", "gradient offset 2^20", "live offset 2^20"],
    RoundedExponents: ["statistics offset 2^13", "statistics offset 2^20", "statistics maps offset 2^20"],
    MaskCapped: ["target_logits softcap masked", "statistics softcap masked"],
    TanhByExponentials: ["target_logits softcap large"],
    ZeroWeightsLeftOut: ["statistics weighted masked"],
    SoftcapForgotten: ["target_logits k3 bias softcap", "live everything"],
}
