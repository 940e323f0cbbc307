"""The same step of the algorithm has the same file name and the same kernels in Triton, CUDA C++ and Numba."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cce

BACKENDS = Path(cce.__file__).parent / "backends"
#: Kernels of each step. One that a language lacks is several of its own there, or PyTorch's.
STEPS = {
    "statistics": {"statistics"},
    "targets": {"target_logits"},
    "gradient": {"gradient"},
    "live": {"live"},
    "products": {"products", "dbias"},
    "compensation": {"mean_rows", "dead_mass"},
    "rows": {"outputs", "joined", "fill_maps", "gather_rows", "scatter_rows", "add_rank_one"},
    "one_pass": {"prepare", "prepare_mean", "store", "join", "scale", "value", "multiply"},
    "lists": {
        "hits", "live_tiles", "chunks", "items",  # in each language that has the step
        "rank", "row_of", "tiles",  # CUDA C++: counts and places by one warp each
        "rows", "count", "scan", "blocks", "columns",  # Triton: one table a kernel
    },
}  # fmt: skip
#: Steps of which each language has a file.
EVERYWHERE = {"statistics", "targets", "gradient", "live", "products", "compensation"}


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
        step = max((name for name in STEPS if path.stem.startswith(name)), key=len, default=path.stem)
        for name in re.findall(r"__global__[^(]*\([^)]*\)[\s\S]*?(\w+)\(const __grid_constant__", path.read_text()):
            assert re.fullmatch(r"\w+_(kernel|sm90)", name), f"{path.name}: {name}"
            yield step, re.sub("_(kernel|sm90)$", "", name)


def in_numba() -> Iterator[tuple[str, str]]:
    """File and kernel: those of which ``compile.py`` makes kernels, by ``file.make_kernel``."""
    made = re.findall(r'Kernel\("(\w+)\.make_(\w+)"', (BACKENDS / "numba/compile.py").read_text())
    for file, kernel in made:
        tree = ast.parse((BACKENDS / "numba/kernels" / f"{file}.py").read_text())
        inner = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert kernel in inner, f"{file}.py: make_{kernel} makes no {kernel}"
    return iter(made)


LANGUAGES = {"triton": in_triton, "cuda": in_cuda, "numba": in_numba}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_kernel_is_where_its_step_is(language: str) -> None:
    found = list(LANGUAGES[language]())
    assert len(found) == len(set(found)) or language == "cuda"  # where Hopper has kernels of its own
    misplaced = [(file, kernel) for file, kernel in found if kernel not in STEPS.get(file, ())]
    assert not misplaced
    assert {file for file, _ in found} >= EVERYWHERE


def test_common_kernels() -> None:
    triton, cuda, numba = ({kernel for _, kernel in kernels()} for kernels in LANGUAGES.values())
    of_every = set().union(*(STEPS[step] for step in EVERYWHERE))
    assert triton & cuda & numba == of_every
    assert triton & cuda >= {"fill_maps", "gather_rows", "scatter_rows", "hits", "live_tiles", "items", "chunks"}
    assert triton & cuda >= {"prepare", "store", "join", "scale", "value", "multiply"}
