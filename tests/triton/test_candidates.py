"""The candidates: each keeps to the spec, and compiles for an H100 within its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
from launches import ARCHITECTURES, Setting, cache_folder_of, compile_launches

from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.backends.triton.choice import launched_with
from cce.backends.triton.launch import TILES, Device, Launch, Tile, fitted, shipped
from cce.spec import Spec
from cce.testing import Case
from cce.testing.data import make_problem
from cce.tuning.candidates import candidates, kernels_of

BF16, F32 = torch.bfloat16, torch.float32
PROBLEMS = [
    Problem(
        n=n, v=32_000, d=d, k=k, e_dtype=dtype, c_dtype=dtype, device="cuda", softcap=softcap,
        outputs=frozenset(outputs), grad_e=True, grad_c=True,
    )
    for n, d, dtype, (k, softcap, outputs) in product(
        (100, 8192), (100, 2304), (BF16, F32), ((1, None, ()), (2, None, ()), (1, 30.0, ()), (1, None, ("entropy",)))
    )
]  # fmt: skip
SPECS = [
    Spec(filter="none"),
    Spec(filter="none", block_n=100, block_v=100),
    Spec(filter="element"),
    Spec(filter="tile", block_n=16, block_v=32),
    Spec(filter="element", block_n=32, block_v=256),
    Spec(filter="element", block_n=128, block_v=16),
]
DEVICES = [Device("A GPU", capability, 132, p) for capability in ((8, 0), (9, 0), (10, 0)) for p in ("ieee", "tf32")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.filter}-{spec.block_n}-{spec.block_v}")
def test_candidates_keep_to_the_spec(spec: Spec) -> None:
    """The blocks of the filter are the spec's, whatever the product's tile."""
    seen = 0
    for problem, device in product(PROBLEMS, DEVICES):
        resolved = resolve(spec, problem)
        launch = shipped(problem, resolved, device)
        assert keeps_to(resolved, problem, launch)
        for kernel in kernels_of(problem, resolved):
            found = candidates(kernel, launch, problem, resolved, device)
            assert len(set(found)) == len(found) and getattr(launch, kernel) not in found
            for tile in found:
                tried = fitted(launch.with_tiles({kernel: tile}), problem, resolved)
                assert getattr(tried, kernel) == tile
                assert fitted(tried, problem, resolved) == tried
                assert keeps_to(resolved, problem, tried)
            seen += len(found)
    assert seen > 4 * len(PROBLEMS) * len(DEVICES)


def keeps_to(spec: Spec, problem: Problem, launch: Launch) -> bool:
    """What the kernels take for granted."""
    if launch.dense.columns > 256 or (launch.dense.flatten and (problem.k > 1 or problem.softcap or problem.outputs)):
        return False
    if spec.filter == "none":
        return True
    return (
        launch.forward.columns % spec.block_v == 0
        and launch.sparse.rows == launch.de.rows == spec.block_n
        and launch.sparse.columns % spec.block_v == 0
        and spec.block_v % launch.de.depth == 0
        and spec.block_v % launch.dc.rows == 0
        and spec.block_n % launch.dc.depth == 0
        and launch.de.warps == launch.dc.warps
    )


def test_kernels() -> None:
    problem, spec = PROBLEMS[0], resolve(Spec(filter="element"), PROBLEMS[0])
    assert kernels_of(problem, spec) == ("forward", "sparse", "de", "dc")
    assert kernels_of(replace(problem, grad_e=False), spec) == ("forward", "sparse", "dc")
    assert kernels_of(replace(problem, grad_c=False), spec) == ("forward", "sparse", "de")
    assert kernels_of(replace(problem, grad_e=False, grad_c=False), spec) == ("forward",)
    assert kernels_of(problem, replace(spec, filter="none")) == ("forward", "dense")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"rows": 100}, "Tile.rows: got 100, expected a power of two"),
        ({"columns": 8}, "Tile.columns: got 8, expected a power of two"),
        ({"depth": 512}, "Tile.depth: got 512, expected a power of two"),
        ({"warps": 0}, "Tile.warps: got 0, expected a power of two"),
        ({"stages": 11}, "Tile.stages: got 11, expected an int"),
        ({"stages": "3"}, "Tile.stages: got '3' of type str, expected an int"),
        ({"warps": True}, "Tile.warps: got True of type bool, expected an int"),
        ({"flatten": 1}, "Tile.flatten: got 1, expected True or False"),
    ],
)
def test_bad_tiles(fields: dict[str, object], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        replace(Tile(128, 128, 32), **fields)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cache_folder_of(tmp_path_factory):
        yield


HOPPER = ARCHITECTURES[1]
#: The candidates of each kernel that ask most of the architecture, side by side in one configuration.
ROUNDS = {
    "none": (
        {"forward": Tile(256, 128, 64, stages=4), "dense": Tile(128, 128, 128, stages=3)},
        {"forward": Tile(128, 128, 128, stages=3), "dense": Tile(256, 128, 64, stages=3, flatten=True)},
    ),
    "element": (
        {"sparse": Tile(128, 256, 64, stages=4), "dc": Tile(128, 256, 64, stages=7)},
        {"sparse": Tile(128, 128, 128, stages=3), "de": Tile(128, 256, 64, stages=7)},
    ),
}


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("filter", "nth"), [(filter, nth) for filter in ROUNDS for nth in range(2)])
@pytest.mark.usefixtures("cache_folder")
def test_compiles(filter: str, nth: int) -> None:
    case = replace(Case("", n=256, d=512, v=1024, e_dtype=BF16, c_dtype=BF16), spec={"filter": filter})
    problem, device = make_problem(case, "cpu"), Device("A GPU", HOPPER.capability, 1, "ieee")
    spec = resolve(case.make_spec(), problem)
    launch, tiles = shipped(problem, spec, device), ROUNDS[filter][nth]
    assert set(tiles) <= set(TILES)
    for kernel, tile in tiles.items():
        assert tile in candidates(kernel, launch, problem, spec, device)
    launch = fitted(launch.with_tiles(tiles), problem, spec)
    with launched_with(launch):
        found = [kernel for kernel in compile_launches(Setting(case), HOPPER) if kernel.multiplies]
    assert len(found) == 3
    for kernel in found:
        assert "wgmma" in kernel.ptx, kernel.name
        assert kernel.shared <= HOPPER.shared, f"{kernel.name}: {kernel.shared} bytes of shared memory"
        assert kernel.stack <= 32, f"{kernel.name} spills {kernel.stack} bytes"
