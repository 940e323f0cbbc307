"""The memory over the inputs and gradients: the scratch memory, and little beside it."""

from __future__ import annotations

import pytest
import torch
from heads import peaked

import cce

pytestmark = pytest.mark.gpu

MIB = 2**20
SPECS = {
    "exact": cce.Spec(filter="none"),
    "natural": cce.Spec(filter="element", vocab_order="natural"),
    "ordered": cce.Spec(filter="element"),
}


@pytest.mark.parametrize("scratch", [32 * MIB, 128 * MIB], ids=["32MiB", "128MiB"])
@pytest.mark.parametrize("name", SPECS)
def test_peak(name: str, scratch: int, backend: str) -> None:
    """Forward and backward: 64 MiB for the maps, the float32 sum of dE, the plan and small vectors."""
    n, d, v = 2048, 512, 64_000
    assert n * v * 2 > scratch  # not in one pass
    head = peaked(n, d, v)
    e, c = head.leaves()
    spec = cce.Spec(filter=SPECS[name].filter, vocab_order=SPECS[name].vocab_order, scratch_bytes=scratch)

    def step() -> None:
        torch.autograd.grad(cce.loss(e, c, head.targets, backend=backend, spec=spec), (e, c))

    step()  # compiles, and makes the library's workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    over = peak - e.nbytes - c.nbytes
    assert over <= scratch + 64 * MIB, f"{over / MIB:.0f} MiB over the gradients"


def test_one_pass_peak(backend: str) -> None:
    """All logits in the scratch memory, once."""
    n, d, v = 1024, 512, 64_000
    head = peaked(n, d, v)
    e, c = head.leaves()
    spec = cce.Spec(filter="none", scratch_bytes=n * v * 2)
    torch.autograd.grad(cce.loss(e, c, head.targets, backend=backend, spec=spec), (e, c))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(cce.loss(e, c, head.targets, backend=backend, spec=spec), (e, c))
    over = torch.cuda.max_memory_allocated() - before - e.nbytes - c.nbytes
    assert over <= n * v * 2 + 16 * MIB, f"{over / MIB:.0f} MiB over the gradients"
