"""The backends and the device that ``pytest --pyargs cce.testing`` runs on; plugin/ has the options."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_name" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backend") or ["torch"]
        metafunc.parametrize("backend_name", names)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))
