"""The backends and the device that ``pytest --pyargs cce.testing`` runs on."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", 'long: of a group, more than an interpreter needs: -m "not long" leaves it out')


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_name" in metafunc.fixturenames:
        # The plugin's options exist only where the kit was named; our own suite runs every CPU backend.
        names = metafunc.config.getoption("backend", None) or ["torch", "reference"]
        metafunc.parametrize("backend_name", names)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("device", "cpu"))
