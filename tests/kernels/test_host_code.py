"""The conformance kit on the host code of the GPU backends, with plain kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from plain_backend import PlainBackend

import cce
from cce import registry
from cce.testing import BEHAVIOURS, CASES, Case, run_case
from cce.testing.behaviours import Behaviour
from cce.testing.check_option import check_option
from cce.testing.options import OPTIONS, Option

REFUSED = {"float64-sums", "plain-float64", "filtered-float64", "full-float64"}  # and blocks of odd sizes
ODD = {"filtered-natural-rows", "filtered-single-rows", "filtered-odd-blocks"}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    cce.register_backend("plain", PlainBackend)
    yield
    cce.unregister_backend("plain")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    result = run_case(registry.load("plain"), case)
    assert bool(result.refused) == (case.name in REFUSED | ODD), result.refused
    assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_behaviour(behaviour: Behaviour) -> None:
    behaviour("plain", "cpu")


@pytest.mark.parametrize("option", [x for options in OPTIONS.values() for x in options], ids=str)
def test_option(option: Option) -> None:
    check_option(option, "plain", "cpu")
