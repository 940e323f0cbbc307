"""``cce info``: what it shows, with and without rich, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

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
