"""``cce info``: what it shows, with and without rich, and what it does not import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cce
from cce.cli import info, main


@pytest.mark.parametrize("rich", [True, False])
def test_shows_versions_devices_and_backends(
    rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rich:
        monkeypatch.setattr(info, "find_spec", lambda name: None)
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert ("┃" in out or "│" in out) == rich
    for expected in ("Versions", cce.__version__, torch.__version__, "transformers", "Devices", "threads"):
        assert expected in out
    assert "Backends on cpu" in out
    assert all(name in out for name in cce.list_backends())


def test_reasons_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cce.explain(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    found.reasons.update(never=["too [old]", "too slow"])
    monkeypatch.setattr(info, "explain_training", lambda device, dtype: found)
    rows = dict(info.backends(torch.device("cpu")).rows)
    assert rows["never"] == "too [old]\ntoo slow"
    assert rows["torch"] == "can run"
    assert rows["auto"] == "runs torch"


def test_packages_that_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(info.OPTIONAL, "absent", ("surely-not-a-distribution",))
    assert ("absent", "not installed") in info.versions().rows


def test_runs_as_a_module_and_imports_no_kernel_framework() -> None:
    code = (
        "import runpy, sys; sys.argv = ['cce', 'info']\n"
        "try: runpy.run_module('cce', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({'triton', 'cupy', 'numba', 'transformers', 'tokenizers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs the distribution ``cce`` of the package index, as far as importlib.metadata can tell."""
    folder = tmp_path / "cce-0.3.3.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: cce\nVersion: 0.3.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_says_where_cce_is_imported_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "OTHER", "surely-not-a-distribution")
    rows = dict(info.versions().rows)
    assert rows["cce"] == f"{cce.__version__}, imported from {Path(cce.__file__).parent}"
    assert "warning" not in rows


def test_warns_of_the_other_distribution_of_the_same_import_name(other: Path) -> None:
    text = dict(info.versions().rows)["warning"]
    assert f"'cce', 0.3.3, in {other} has the same import name" in text
    assert "pip uninstall cce cce-kernels" in text


def test_the_other_package_is_not_taken_for_ours(
    other: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    """Its ``cce/__init__.py`` has none of our names."""
    monkeypatch.delattr(cce, "list_backends")
    line = fails("info")
    assert str(Path(cce.__file__).parent) in line and str(other) in line
    assert "is not cce-kernels" in line and "pip uninstall cce cce-kernels" in line
