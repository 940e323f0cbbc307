"""The options of ``pytest --pyargs cce.testing --backend NAME``.

pytest reads the conftest.py of a package named by --pyargs too late for options, so they come from a plugin.
Every pytest run in an environment with cce imports it: it stands outside the package (pyproject.toml installs it
as a top-level module), so that those runs do not import torch.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cce")
    group.addoption("--backend", action="append", default=None, help="cce backend to check; may be repeated (torch)")
    group.addoption("--device", default="cpu", help="torch device the tensors live on (cpu)")
