"""The conformance kit on the host code of the GPU backends, with plain kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import cce
from cce import registry
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.sizes import place_of_copy
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.testing import BEHAVIOURS, CASES, LAYOUTS, PATTERNS, Case, run_case
from cce.testing.behaviours import Behaviour
from cce.testing.check_option import check_option
from cce.testing.data import make_problem
from cce.testing.kernels.plain import PlainKernels
from cce.testing.kernels.plain_backend import PlainBackend
from cce.testing.layouts import Placed, check_layout
from cce.testing.options import OPTIONS, Option
from cce.testing.patterns import Pattern, check_pattern

pytestmark = pytest.mark.usefixtures("one_thread")

#: And blocks of odd sizes.
REFUSED = {"float64-sums", "plain-float64", "filtered-float64", "full-float64", "offset-float64"}
ODD = {"filtered-natural-rows", "filtered-single-rows", "filtered-odd-blocks"}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    cce.register_backend("plain", PlainBackend)
    yield
    cce.unregister_backend("plain")


def test_a_package_that_is_missing_is_no_error() -> None:
    """What it refuses can be asked anywhere; ``unavailable`` tells the rest."""

    class Elsewhere(PlainBackend):
        def kernels(self) -> Kernels:
            raise ModuleNotFoundError("no such package")

    problem = Problem(9, 9, 9, e_dtype=torch.float64, c_dtype=torch.float64)
    for refused in (True, False):
        problem = problem if refused else replace(problem, e_dtype=torch.float32, c_dtype=torch.float32)
        assert bool(Elsewhere().unsupported(problem, resolve(cce.Spec(), problem))) == refused


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    result = run_case(registry.load("plain"), case)
    assert bool(result.refused) == (case.name in REFUSED | ODD), result.refused
    assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("placed", LAYOUTS, ids=str)
def test_layout(placed: Placed) -> None:
    assert not check_layout(placed, "plain", "cpu")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pattern(pattern: Pattern) -> None:
    assert not check_pattern(pattern, "plain", "cpu")


FILTER = {"filter": "element", "threshold": 2.0**-9, "block_n": 16, "block_v": 32}
WIDE = Case("rows copied", n=90, d=600, v=800, data="peaked", bias=True, spec={**FILTER, "scratch_bytes": 2**16})
IN_PLACE = replace(WIDE, e_dtype=torch.bfloat16)  # dE's memory is too small for a copy in float32
#: What the kit's sizes do not come to: rows of ``e`` too many for the scratch, operands that are copied in pieces.
MORE = [
    replace(WIDE, name="rows in dE"),
    replace(WIDE, name="rows in dE, in an order, some left out", vocab_order=True, m=120, k=2),
    replace(WIDE, name="rows in dE, float16", d=1200, e_dtype=torch.float16, c_dtype=torch.float16),
    replace(WIDE, name="rows copied, no dE", spec={**FILTER, "scratch_bytes": 2**17}, wanted=("c",)),
    replace(IN_PLACE, name="rows in place"),
    replace(IN_PLACE, name="rows in place, some left out", m=120, k=2, outputs=("entropy",)),
    replace(IN_PLACE, name="rows in place, in an order", vocab_order=True, spec={**WIDE.spec, "threshold": 2.0**-6}),
    replace(IN_PLACE, name="rows in place, strided", strided=True, outputs=("weighted_logit",)),
    replace(WIDE, name="rows in place, no dE", wanted=("c", "bias")),
    replace(WIDE, name="c in windows", d=601, spec={"filter": "none", "scratch_bytes": 2**19}),
    replace(WIDE, name="c of another dtype", d=64, c_dtype=torch.bfloat16, outputs=("prediction", "weighted_logit")),
    replace(WIDE, name="c of another dtype, exact", c_dtype=torch.bfloat16, spec={"filter": "none"}, softcap=6.0),
    replace(WIDE, name="mass in pieces", d=40, v=4000, softcap=6.0, outputs=("entropy",)),
]


@pytest.mark.parametrize("case", MORE, ids=str)
def test_more(case: Case) -> None:
    result = run_case(registry.load("plain"), case)
    assert result.passed, "\n".join([*result.failures, *result.refused])


LIBRARY = {"filtered", "filtered-mass", "filtered-entropy-softcap", "filtered-order", "filtered-float16", MORE[-1].name}


@pytest.mark.parametrize("case", [case for case in (*CASES, *MORE) if case.name in LIBRARY], ids=str)
def test_with_the_librarys_operations(case: Case) -> None:
    """What kernels need not bring."""

    class LibraryKernels(PlainKernels):
        mean_rows = Kernels.mean_rows
        dead_mass = Kernels.dead_mass
        fill_maps = Kernels.fill_maps
        gathers_ahead = Kernels.gathers_ahead
        work_list = Kernels.work_list

    class Library(PlainBackend):
        def kernels(self) -> Kernels:
            return LibraryKernels()

    assert not run_case(Library(), case).failures


def test_rows_lie_where_a_case_says() -> None:
    for case in MORE:
        if "rows" not in case.name:
            continue
        problem = make_problem(case, "cpu")
        place = place_of_copy(problem, resolve(case.make_spec(), problem), Kernels.rows_in_scratch)
        words = {"scratch": "copied", "beside": "copied", "de": "in dE", "nowhere": "in place"}
        assert words[place] in case.name, place


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_behaviour(behaviour: Behaviour) -> None:
    behaviour("plain", "cpu")


@pytest.mark.parametrize("option", [x for options in OPTIONS.values() for x in options], ids=str)
def test_option(option: Option) -> None:
    check_option(option, "plain", "cpu")
