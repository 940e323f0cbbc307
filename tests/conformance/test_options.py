"""A backend that gets an option wrong cannot have a ✓ in docs/options.md: running the row fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutants
import pytest
from my_backend import MyBackend

import cce
from cce.testing.check_option import check_option
from cce.testing.options import OPTIONS, Option

ROWS = {str(option): option for options in OPTIONS.values() for option in options}


class Refusing(MyBackend):
    """Declares a refusal of its own for every softcap."""

    def unsupported(self, problem: Any, spec: Any) -> list[str]:
        return [f"softcap={problem.softcap}: none here"] if problem.softcap else []


@pytest.fixture
def register() -> Iterator[Any]:
    names: list[str] = []

    def register(backend: type[MyBackend]) -> str:
        cce.register_backend(backend.__name__, backend)
        names.append(backend.__name__)
        return names[-1]

    yield register
    for name in names:
        cce.unregister_backend(name)


WRONG = [
    (mutants.SoftcapForgotten, "`softcap`"),
    (mutants.ScaleForgotten, "`logit_scale`"),
    (mutants.BiasTwice, "`bias`"),
    (mutants.OneUpstreamForAll, '`reduction="none"`'),
    (mutants.RepeatedTargetOnce, "`target_weight` (soft targets)"),
    (mutants.EntropyForgotten, "`entropy`"),
    (mutants.OrderIgnored, "`vocab_order`, a permutation, exact"),
    (mutants.HalfAccumulator, "float32"),
    (mutants.FilterIgnored, '`filter="element"`'),
    (mutants.NoCompensation, '`filter="tile"`'),
]


@pytest.mark.parametrize(("mutant", "row"), WRONG, ids=[row for _, row in WRONG])
def test_a_wrong_option_is_caught(mutant: type[MyBackend], row: str, register: Any) -> None:
    check_option(ROWS[row], register(MyBackend), "cpu")
    with pytest.raises(AssertionError):
        check_option(ROWS[row], register(mutant), "cpu")


class CompensatesAlways(MyBackend):
    """``compensate=False`` is accepted and ignored."""

    def add_skipped(self, inputs: Any, problem: Any, spec: Any, *rest: Any) -> None:
        super().add_skipped(inputs, problem, cce.Spec(compensate=True, block_v=spec.block_v), *rest)


class RefusesInSecret(MyBackend):
    """Declares that it can, and then cannot."""

    def forward(self, inputs: Any, problem: Any, spec: Any, maps: Any) -> Any:
        raise cce.BackendUnavailable("no")


def test_an_option_that_is_accepted_and_ignored(register: Any) -> None:
    with pytest.raises(AssertionError, match="no effect"):
        check_option(ROWS["`compensate=False`"], register(CompensatesAlways), "cpu")


def test_refusals(register: Any) -> None:
    """A declared one is checked and passes; one that nobody declared does not."""
    name = register(Refusing)
    for row in ("`softcap`", "`bias`"):
        check_option(ROWS[row], name, "cpu")
    with pytest.raises(cce.BackendUnavailable):
        check_option(Option("undeclared"), register(RefusesInSecret), "cpu")


def test_the_package_has_no_conftest_beside_the_kit() -> None:
    """pytest loads that of a checkout for the installed package's: of a folder called test*, or of the package."""
    package = Path(cce.__file__).parent
    assert not [*package.glob("conftest.py"), *package.glob("test*/conftest.py")]
