"""The targets on the GPU, in one kernel once Triton is in use: as the operations that do the same elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import cce
from cce.frontend.operators import prepare_targets

pytestmark = pytest.mark.gpu

BAD = """
import sys, torch, cce
e = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16)
c = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16)
targets = torch.tensor([1, 2, 3, 99, 0], device="cuda")
cce.loss(e, c, targets, backend="triton").item()  # from here on Triton is in use
targets[3] = int(sys.argv[1])
print("first", flush=True)
cce.loss(e, c, targets, backend="triton").item()
print("second")
"""


@pytest.fixture(autouse=True)
def triton_in_use(device: str) -> None:
    cce.loss(torch.ones(2, 16, device=device), torch.ones(3, 16, device=device), torch.zeros(2, device=device).long(),
             backend="triton")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 7, 2**40])
@pytest.mark.parametrize("shape", [(1, 1), (300, 1), (100_000, 3)], ids=str)
def test_prepared(shape: tuple[int, int], ignore_index: int, dtype: torch.dtype) -> None:
    targets = torch.randint(100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    info = torch.iinfo(dtype)
    if info.min <= ignore_index <= info.max:
        targets[::3] = ignore_index
    found = prepare_targets(targets.cuda(), 100, ignore_index)
    assert found.dtype == torch.int64
    assert torch.equal(found.cpu(), prepare_targets(targets, 100, ignore_index))
    columns = targets.cuda().T.contiguous().T
    assert torch.equal(prepare_targets(columns, 100, ignore_index), found)


@pytest.mark.parametrize("target", ["100", "-1"])
def test_outside_is_an_assertion(target: str) -> None:
    done = subprocess.run([sys.executable, "-c", BAD, target], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout.split() == ["first"]
    assert "device-side assert" in done.stderr, done.stderr
