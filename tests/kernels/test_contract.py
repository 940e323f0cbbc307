"""The cases of the kernels' contract run, and tell right kernels from wrong ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from contract_mutants import MUTANTS
from doubles import DenseKernels

from cce.backends.gpu.arrays import Sizes
from cce.backends.gpu.forward import _fill
from cce.backends.gpu.kernels import Kernels
from cce.testing.kernels import contract
from cce.testing.kernels.cases import CASES
from cce.testing.kernels.plain import PlainKernels

pytestmark = pytest.mark.usefixtures("one_thread")

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
