"""The kit passes the example it was derived from, and catches every mutant of it."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, MyBackend

import cce
from cce.testing import BEHAVIOURS, CASES, check_backend, run_case


@pytest.fixture
def registered(request):
    cce.register_backend(request.param.__name__, request.param)
    yield request.param
    cce.unregister_backend(request.param.__name__)


@pytest.mark.parametrize("registered", [MyBackend], indirect=True)
def test_example_passes(registered):
    report = check_backend(registered.__name__)
    assert report.passed, str(report)
    assert len(report.results) == len(CASES) and not any(result.refused for result in report.results)


@pytest.mark.parametrize("registered", MUTANTS, indirect=True, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(registered):
    assert caught(registered), f"the kit passes {registered.__name__}: {registered.__doc__}"


def caught(mutant) -> bool:
    """Whether any case or behaviour fails; stops at the first."""
    # Behaviours that compile cost seconds, and no mutant needs them.
    behaviours = [b for b in BEHAVIOURS if b.__name__ != "compiled"]
    return any(run_case(mutant(), case).failures for case in CASES) or any(fails(b, mutant) for b in behaviours)


def fails(behaviour, mutant) -> bool:
    try:
        behaviour(mutant.__name__, "cpu")
    except AssertionError:
        return True
    return False
