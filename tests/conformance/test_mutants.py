"""The kit passes the example it was derived from, and catches every mutant of it."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, MyBackend

import cce
from cce.testing import BEHAVIOURS, CASES, GROUPS, LAYOUTS, PATTERNS, check_backend, run_case
from cce.testing.layouts import check_layout
from cce.testing.patterns import check_pattern


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
    """Whether any check fails; those of its group come first, and the first failure ends it."""
    first = getattr(mutant, "group", "cases")
    return any(failed(mutant, group) for group in sorted(GROUPS, key=lambda group: group != first))


def failed(mutant, group: str) -> bool:
    name = mutant.__name__
    if group == "cases":
        return any(run_case(mutant(), case).failures for case in CASES)
    if group == "layouts":
        return any(fails(check_layout, placed, name) for placed in LAYOUTS)
    if group == "patterns":
        return any(fails(check_pattern, pattern, name) for pattern in PATTERNS)
    # Behaviours that compile cost seconds, and no mutant needs them.
    return group == "behaviours" and any(fails(b, name) for b in BEHAVIOURS if b.__name__ != "compiled")


def fails(check, *arguments) -> bool:
    try:
        check(*arguments, "cpu")
    except (AssertionError, RuntimeError):
        return True
    return False
