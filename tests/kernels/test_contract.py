"""The cases of the kernels' contract run, and tell right kernels from wrong ones."""

from __future__ import annotations

from dataclasses import replace

import contract
import pytest
import torch
from contract_cases import CASES
from doubles import DenseKernels
from plain import PlainKernels, logits

from cce.backends.gpu.kernels import Kernels, Sizes

pytestmark = pytest.mark.usefixtures("one_thread")

#: Other tiles than the oracle's own.
OTHER = Sizes(forward_rows=16, forward_columns=256, gradient_rows=16, gradient_columns=32, pack=3, programs=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_kernels_meet_it(case):
    _, passed, message = contract.run_case(PlainKernels(OTHER), case)
    assert passed, message


LIBRARY = ("joined_lse", "mean_rows", "work_list", "plan", "gather_rows", "scatter_rows")


@pytest.mark.parametrize("case", [case for case in CASES if case.method in LIBRARY], ids=str)
def test_the_library_meets_it(case):
    class Library(PlainKernels):
        mean_rows = Kernels.mean_rows
        work_list = Kernels.work_list

    _, passed, message = contract.run_case(Library(OTHER), case)
    assert passed, message


@pytest.mark.parametrize("case", [case for case in CASES if case.method == "live"], ids=str)
def test_dense_kernels_meet_it(case):
    """Which read the plan in another way, so that the cases are not compared with themselves alone."""
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

    def joined_lse(self, splits, target_logits, targets, in_use):
        return super().joined_lse(splits, target_logits, torch.full_like(targets, -1), in_use)


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

    def fill_maps(self, problem, spec, lse, in_use, tiles, maps):
        super().fill_maps(problem, spec, lse, in_use, tiles, maps)
        maps.tile_mass.abs_()
        return True


class SortedInPlace(PlainKernels):
    """Rows stay where they are."""

    def gather_rows(self, e, row_order, keep, out):
        super().gather_rows(e, row_order.sort()[0], keep, out)

    def scatter_rows(self, spec, total, norm, row_order, out):
        super().scatter_rows(spec, total, norm, row_order.sort()[0], out)


def first_target(rows):
    return replace(rows, targets=rows.targets[:, :1], g=rows.g[:, :1])


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
    NoTargets: ["joined_lse", "joined_lse k3"],
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
