"""The conformance suite on every backend given with ``--backend``.

``-k "not layout"`` leaves a group out; ``-m "not long"``, for an interpreter, what reaches no kernel, and most layouts
and patterns.
"""

from __future__ import annotations

from typing import Any

import pytest

from cce import registry
from cce.testing.behaviours import BEHAVIOURS, Behaviour, compiled
from cce.testing.cases import CASES, Case
from cce.testing.check import run_case
from cce.testing.check_option import check_option
from cce.testing.layouts import LAYOUTS, Placed, check_layout
from cce.testing.options import OPTIONS, Option
from cce.testing.patterns import PATTERNS, Pattern, check_pattern
from cce.testing.report import product_roundoff


# Hooks and fixtures are here and not in a conftest.py: where tests run beside a checkout, pytest would load the
# checkout's for the installed package's.
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # The plugin's options exist only where the kit was named; our own suite runs the CPU backends. A case's oracle is
    # the reference, which would be compared with itself.
    names = ["torch"] if metafunc.function is test_case else ["torch", "reference"]
    metafunc.parametrize("backend_name", metafunc.config.getoption("backend", None) or names)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("device", "cpu"))


def marked(check: Case | Option | Placed | Pattern) -> Any:
    return pytest.param(check, marks=() if check.short else pytest.mark.long)


def marked_behaviour(behaviour: Behaviour) -> Any:
    # Compilation stops at the operators: it sees no kernel.
    return pytest.param(behaviour, marks=pytest.mark.long if behaviour is compiled else (), id=behaviour.__name__)


@pytest.mark.parametrize("case", [marked(x) for x in CASES], ids=str)
def test_case(backend_name: str, case: Case, device: str) -> None:
    result = run_case(registry.load(backend_name), case, device, product_roundoff(device))
    if result.refused:
        pytest.skip("; ".join(result.refused))
    assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("behaviour", [marked_behaviour(x) for x in BEHAVIOURS])
def test_behaviour(backend_name: str, behaviour: Behaviour, device: str) -> None:
    behaviour(backend_name, device)


@pytest.mark.parametrize("option", [marked(x) for options in OPTIONS.values() for x in options], ids=str)
def test_option(backend_name: str, option: Option, device: str) -> None:
    check_option(option, backend_name, device)


@pytest.mark.parametrize("placed", [marked(x) for x in LAYOUTS], ids=str)
def test_layout(backend_name: str, placed: Placed, device: str) -> None:
    refused = check_layout(placed, backend_name, device)
    if refused:
        pytest.skip("; ".join(refused))


@pytest.mark.parametrize("pattern", [marked(x) for x in PATTERNS], ids=str)
def test_pattern(backend_name: str, pattern: Pattern, device: str) -> None:
    refused = check_pattern(pattern, backend_name, device)
    if refused:
        pytest.skip("; ".join(refused))
