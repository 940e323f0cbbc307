"""The cases of the kernels' contract run, and tell right kernels from wrong ones."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import contract
import pytest
import torch
from contract_cases import CASES
from doubles import DenseKernels
from plain import PlainKernels, logits

from cce.backends.gpu.forward import _fill
from cce.backends.gpu.kernels import Kernels, Sizes

pytestmark = pytest.mark.usefixtures("one_thread")

LOG2E = 1.4426950408889634
#: Other tiles than the oracle's own.
OTHER = Sizes(forward_rows=16, forward_columns=256, gradient_rows=16, gradient_columns=32, pack=3, programs=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_kernels_meet_it(case):
    _, passed, message = contract.run_case(PlainKernels(OTHER), case)
    assert passed, message


LIBRARY = ("joined", "fill_maps", "mean_rows", "work_list", "plan", "gather_rows", "scatter_rows")


@pytest.mark.parametrize("case", [case for case in CASES if case.method in LIBRARY], ids=str)
def test_the_library_meets_it(case):
    class Library(PlainKernels):
        mean_rows = Kernels.mean_rows
        work_list = Kernels.work_list

        def fill_maps(self, problem, spec, *given):
            kernels = SimpleNamespace(fill_maps=lambda *given: False)
            _fill(SimpleNamespace(kernels=kernels, problem=problem, spec=spec, tiles=spec.tiles(problem.v)), *given)
            return True

    _, passed, message = contract.run_case(Library(OTHER), case)
    assert passed, message


@pytest.mark.parametrize("case", [x for x in CASES if x.method == "live" and not x.strange], ids=str)
def test_dense_kernels_meet_it(case):
    """Which read the plan in another way, so that the cases are not compared with themselves alone.

    They multiply dead tiles by 0: a row of NaN would be everywhere, as it is where a work list has it live everywhere.
    """
    _, passed, message = contract.run_case(DenseKernels(OTHER), case)
    assert passed, message


class FirstWindowOnly(PlainKernels):
    """Each window begins anew."""

    def statistics(self, problem, spec, e, c, formula, weight, first, splits, tiles):
        super().statistics(problem, spec, e, c, formula, weight, 0, splits, None)


class LastColumnDropped(PlainKernels):
    """The last column of a window counts for nothing."""

    def statistics(self, problem, spec, e, c, formula, weight, first, splits, tiles):
        bias = torch.zeros(len(c), device=c.device) if formula.bias is None else formula.bias.clone()
        bias[-1] = -torch.inf
        super().statistics(problem, spec, e, c, replace(formula, bias=bias), weight, first, splits, tiles)


class LastOfTies(PlainKernels):
    """The prediction is the last of the largest logits."""

    def statistics(self, problem, spec, e, c, formula, weight, first, splits, tiles):
        super().statistics(problem, spec, e, c, formula, weight, first, splits, tiles)
        if splits.best is not None:
            z = logits(e, c, formula)
            last = first + len(c) - 1 - z.flip(1).argmax(1)
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

    def statistics(self, problem, spec, e, c, formula, weight, first, splits, tiles):
        super().statistics(problem, spec, e, c, formula, weight, first, splits, tiles)
        for m, s in ((splits.max, splits.sum), *([(tiles.max, tiles.log_sum)] if tiles else [])):
            base = m.double() * LOG2E
            error = torch.exp2(base.float().double() - base)
            s.copy_(torch.where(s.isfinite() & m.isfinite(), s * error.nan_to_num(), s))


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


class MaskCapped(PlainKernels):
    """A softcap makes -softcap of -inf."""

    def target_logits(self, e, c, targets, formula, out):
        super().target_logits(e, c, targets, finite_bias(formula), out)

    def statistics(self, problem, spec, e, c, formula, weight, first, splits, tiles):
        super().statistics(problem, spec, e, c, finite_bias(formula), weight, first, splits, tiles)


class TanhByExponentials(PlainKernels):
    """A capped logit errs by the softcap's last place."""

    def target_logits(self, e, c, targets, formula, out):
        super().target_logits(e, c, targets, replace(formula, softcap=None), out)
        power = torch.exp(out * (2 / formula.softcap))
        out.copy_(formula.softcap - 2 * formula.softcap / (1 + power))


class ZeroWeightsLeftOut(PlainKernels):
    """Of entries whose weight is 0 the weighted sum hears nothing."""

    def statistics(self, problem, spec, e, c, formula, weight, first, splits, tiles):
        super().statistics(problem, spec, e, c, formula, weight, first, splits, tiles)
        if splits.weighted is not None:
            splits.weighted.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)


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

    def scatter_rows(self, spec, total, norm, row_order, out):
        super().scatter_rows(spec, total, norm, row_order.sort()[0], out)


def first_target(rows):
    return replace(rows, targets=rows.targets[:, :1], g=rows.g[:, :1])


def without_rest(rows):
    return replace(rows, lse_low=rows.lse_low * 0)


def finite_bias(formula):
    return formula if formula.bias is None else replace(formula, bias=formula.bias.clamp(min=-1e30))


MUTANTS = {
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
    NoTargets: ["joined", "joined k3"],
    ShiftForgotten: ["joined offset", "joined offset k3"],
    RestForgotten: ["joined offset", "gradient offset 2^20", "live offset 2^20"],
    RoundedExponents: ["statistics offset 2^13", "statistics offset 2^20", "statistics maps offset 2^20"],
    NanIsDead: ["fill_maps strange", "fill_maps tile strange", "work_list strange"],
    StrangeGradientsAsOthers: ["work_list strange"],
    MaskCapped: ["target_logits softcap masked", "statistics softcap masked"],
    TanhByExponentials: ["target_logits softcap large"],
    ZeroWeightsLeftOut: ["statistics weighted masked"],
    OneTileAnItem: ["plan", "plan one block"],
    AllRowsCount: ["work_list of few", "work_list of parts"],
    TargetsForgotten: ["work_list", "work_list of targets alone"],
    NothingHit: ["fill_maps", "fill_maps tile entropy"],
    SortedInPlace: ["gather_rows", "scatter_rows float32"],
    SoftcapForgotten: ["target_logits k3 bias softcap", "live everything"],
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_do_not(mutant):
    by_name = {case.name: case for case in CASES}
    for name in MUTANTS[mutant]:
        assert not contract.run_case(mutant(OTHER), by_name[name])[1], f"{name}: {mutant.__doc__}"


def test_a_runner_for_scripts():
    """Names in full, and none of them raises."""

    class Broken(PlainKernels):
        def gradient(self, *args):
            raise IndexError("a kernel's own")

    found = contract.run(Broken(OTHER), "cpu", only=["gradient one row", "statistics one"], small=True)
    assert [passed for _, passed, _ in found] == [True, True, False]
    assert found[-1][0] == "gradient one row" and "IndexError: a kernel's own" in found[-1][2]


@pytest.mark.parametrize("case", [case for case in CASES if "blocks" not in case.name], ids=str)
def test_small_cases(case):
    """The sizes of a simulator test as much."""
    _, passed, message = contract.run_case(PlainKernels(OTHER), case, small=True)
    assert passed, message
