"""The options of ``pytest --pyargs cce.testing --backend NAME``, added to that run and to no other.

pytest reads the files of a package named by --pyargs too late for options, so they come from a plugin. Every
pytest run in an environment with cce imports it: pyproject.toml installs it as a top-level module, outside the
package, so that those runs do not import torch.
"""

from __future__ import annotations

from typing import Any


def pytest_load_initial_conftests(early_config: Any, parser: Any, args: list[str]) -> None:
    """Adds the options and the marker if an argument names the conformance kit, before pytest checks its options."""
    if any(arg.partition("::")[0].split(".")[:2] == ["cce", "testing"] for arg in args):
        early_config.addinivalue_line("markers", 'long: more than an interpreter needs: -m "not long" leaves it out')
        group = parser.getgroup("cce")
        group.addoption("--backend", action="append", default=[], metavar="NAME", help="backend to check; repeatable")
        group.addoption("--device", default="cpu", help="torch device the tensors live on")
