"""What ``import cce`` costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ["triton", "cupy", "numba", "transformers", "tokenizers", "matplotlib", "rich", "hypothesis", "pytest"]

# Looks at what is asked for, not at what is found: an import tried and caught would count where it is installed.
LOOK = f"""
import json, sys, torch

class Watch:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            self.asked.append(name)

had = set(sys.modules)
sys.meta_path.insert(0, Watch)
Watch.find_spec = Watch().find_spec
BEFORE
import cce
AFTER
new = set(sys.modules) - had
print(json.dumps([Watch.asked, sorted(name for name in new if name.partition(".")[0] in {HEAVY})]))
"""

NEW = """
import json, sys, torch
had = set(sys.modules)
import cce
new = [name for name in sys.modules if name not in had and name.partition(".")[0] not in sys.stdlib_module_names]
print(json.dumps({name: hasattr(sys.modules[name], "__path__") for name in new}))
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def heavy(before: str = "", after: str = "") -> list[list[str]]:
    return json.loads(run(LOOK.replace("BEFORE", before).replace("AFTER", after)))


def test_no_heavy_import() -> None:
    """Neither a kernel framework nor what only the demo and the tests need, beyond what torch has loaded."""
    assert heavy() == [[], []]


@pytest.mark.parametrize("statement", ["import triton", "try:\n import cupy.cuda\nexcept ImportError: pass"])
def test_the_watch_sees_an_import(statement: str) -> None:
    """Also one that fails and is caught, as an optional dependency's is."""
    caught = f"try:\n exec({statement!r})\nexcept ImportError: pass"
    asked, _ = heavy(before=caught)
    assert asked[0] in statement.replace(".cuda", "")


def test_a_loss_imports_no_kernel_framework() -> None:
    """On a CPU, forward and backward."""
    use = "cce.loss(torch.ones(2, 3, requires_grad=True), torch.ones(4, 3), torch.arange(2)).backward()"
    asked, loaded = heavy(after=use)
    assert not {name.partition(".")[0] for name in asked + loaded} & {"cupy", "numba", "transformers"}


#: Of which something is imported with the front end.
FOLDERS = {"cce", "cce.backends", "cce.backends.shared", "cce.distributed", "cce.frontend"}


def test_the_front_end_alone() -> None:
    """Beside torch and the standard library, a module of another package or one of the kit's would take its time."""
    new = json.loads(run(NEW))
    assert {name.partition(".")[0] for name in new} == {"cce"}
    assert {name for name, package in new.items() if package} == FOLDERS
    backends = {name.removeprefix("cce.backends.") for name in new if name.startswith("cce.backends.")}
    assert {name for name in backends if not name.startswith("shared")} == {"base", "problem", "resolve"}
