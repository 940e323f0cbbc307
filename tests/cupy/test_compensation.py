"""The compensation's kernels compile for every architecture; on a GPU they agree with the library's operations."""

from __future__ import annotations

import pytest
import torch
from compiling import GPUS, compiled
from torch import Tensor

from cce.backends.cupy.compensation import dead_mass, mass_variant, mean_variant
from cce.backends.gpu.compensation import Mass
from cce.backends.gpu.gradients import Scaled
from cce.backends.gpu.operands import Call
from cce.backends.problem import Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.resolve import resolve
from cce.spec import Spec
from cce.testing.kernels.plain import PlainKernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_without_spills(gpu: str, dtype: torch.dtype) -> None:
    half = dtype != torch.float32
    for variant in (mean_variant(GPUS[gpu], dtype), mass_variant(GPUS[gpu], dtype, True, True, half)):
        found = compiled(variant)
        assert (found.stack, found.local) == (0, 0)
        assert found.registers <= 128


def test_a_mean_row_is_read_sixteen_bytes_at_a_time() -> None:
    found = compiled(mean_variant(GPUS["sm_90"], torch.bfloat16), disassemble=True)
    assert "LDG.E.128" in found.instructions and "STG.E.128" in found.instructions


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dead_mass(dtype: torch.dtype, entropy: bool, softcap: float | None) -> None:
    n, v, tiles, blocks = 300, 1000, 8, 3
    outputs = frozenset({"entropy"} if entropy else ())
    problem = Problem(n, v, 72, e_dtype=dtype, c_dtype=dtype, softcap=softcap, logit_scale=0.5, outputs=outputs)
    spec = resolve(Spec(block_n=128, block_v=128, filter="element"), problem)
    draw = torch.Generator("cuda").manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, device="cuda", generator=draw)

    order = torch.randperm(n, device="cuda", generator=draw)
    live = rand(tiles, blocks) < 0.4
    half = torch.float32 if dtype == torch.float32 else torch.float16
    mass = (rand(tiles, n) - 0.2).to(half)
    maps = Maps(tile_mass=mass, tile_entropy=(4 * rand(tiles, n)).to(half) if entropy else None)
    given = Outputs(8 * rand(n), rand(n, 1), entropy=5 * rand(n) if entropy else None)
    upstream = Upstream(rand(n), rand(n, 1), rand(n) if entropy else None)
    targets = torch.zeros(n, 1, dtype=torch.int32, device="cuda")
    inputs = Inputs(rand(n, 72).to(dtype), rand(v, 72).to(dtype), targets.long())
    call = Call.of(PlainKernels(), inputs, problem, spec)
    found = Scaled.of(call, inputs, given, upstream)
    for t0, t1 in ((0, tiles), (5, tiles)):
        expected, out = (torch.empty(t1 - t0, n, dtype=dtype, device="cuda") for _ in range(2))
        Mass(call, order, live, found, given, maps).of(t0, t1, expected)
        dead_mass(problem, spec, found.rows, maps, order, live, t0, out)
        _close(out, expected, dtype)


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Relative norms: half a unit in the last place, and float32's own arithmetic."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= torch.finfo(dtype).eps + 1e-5
