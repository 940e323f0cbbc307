"""The same step of the algorithm has the same file name and the same kernels in Triton, CUDA C++ and Numba."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cce

BACKENDS = Path(cce.__file__).parent / "backends"
#: Kernels of each step that every language has which has the step.
COMMON = {
    "statistics": {"statistics"},
    "targets": {"target_logits"},
    "gradient": {"gradient"},
    "live": {"live"},
    "products": {"products", "dbias"},
    "compensation": {"mean_rows", "dead_mass"},
    "rows": {"fill_maps", "gather_rows", "scatter_rows"},
    "one_pass": {"prepare", "store", "join", "scale", "value", "multiply"},
    "lists": {"hits", "live_tiles", "tile_list", "chunks", "items"},
}
#: Kernels of one language alone.
OWN = {
    "triton": {
        "rows": {"outputs", "add_rank_one"},  # joins with the entropy and the prediction
        "one_pass": {"prepare_mean"},
        "lists": {"count", "scan", "blocks", "columns"},  # one table of the plan each
    },
    "cuda": {"rows": {"joined"}, "lists": {"rank", "row_of"}},
    "numba": {},
}  # fmt: skip
#: Steps that are operations of PyTorch.
WITHOUT = {"triton": set(), "cuda": set(), "numba": {"rows", "one_pass", "lists"}}  # fmt: skip


def in_triton() -> Iterator[tuple[str, str]]:
    """File and kernel: functions that are launched end in ``_kernel``."""
    for path in sorted((BACKENDS / "triton/kernels").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert node.decorator_list, f"{path.name}: {node.name} is not compiled"
                yield path.stem, node.name.removesuffix("_kernel")


def in_cuda() -> Iterator[tuple[str, str]]:
    """File, without what follows the step's name, and kernel."""
    for path in sorted((BACKENDS / "cupy/cuda").rglob("*.cu")):
        step = max((name for name in COMMON if path.stem.startswith(name)), key=len, default=path.stem)
        for name in re.findall(r"__global__[^(]*\([^)]*\)[\s\S]*?(\w+)\(const __grid_constant__", path.read_text()):
            assert name.endswith("_kernel"), f"{path.name}: {name}"
            yield step, name.removesuffix("_kernel")


def in_numba() -> Iterator[tuple[str, str]]:
    """File and kernel: those of which ``compile.py`` makes kernels, by ``file.make_kernel``."""
    made = re.findall(r'Kernel\("(\w+)\.make_(\w+)"', (BACKENDS / "numba/compile.py").read_text())
    for file, kernel in made:
        tree = ast.parse((BACKENDS / "numba/kernels" / f"{file}.py").read_text())
        inner = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert f"{kernel}_kernel" in inner, f"{file}.py: make_{kernel} makes no {kernel}_kernel"
    return iter(made)


LANGUAGES = {"triton": in_triton, "cuda": in_cuda, "numba": in_numba}


@pytest.mark.parametrize("language", LANGUAGES)
def test_kernels_of_the_steps(language: str) -> None:
    found: dict[str, set[str]] = {}
    for file, kernel in LANGUAGES[language]():
        found.setdefault(file, set()).add(kernel)
    own = OWN[language]
    assert found == {
        step: kernels | own.get(step, set()) for step, kernels in COMMON.items() if step not in WITHOUT[language]
    }
