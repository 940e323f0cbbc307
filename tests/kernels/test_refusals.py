"""What the GPU backends say where they cannot run: reasons, never an exception."""

from __future__ import annotations

import pytest
import torch

import cce
from cce import registry
from cce.backends.gpu.refusals import capability_of
from cce.backends.problem import Problem
from cce.backends.resolve import resolve

BACKENDS = ("triton", "cupy", "numba")
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a machine with a GPU of compute capability 7.5."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 77)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: (7, 5))
    capability_of.cache_clear()
    return monkeypatch


@pytest.mark.parametrize("name", BACKENDS)
def test_no_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert registry.load(name).unavailable("cuda")[-1] == "no CUDA GPU is available to torch"


@pytest.mark.parametrize("name", BACKENDS)
def test_old_gpu(name: str, gpu: pytest.MonkeyPatch) -> None:
    assert registry.load(name).unavailable("cuda")[-1].startswith("compute capability 7.5: 8.0 is the least")


@pytest.mark.parametrize("name", BACKENDS)
def test_rocm(name: str, gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "6.4")
    assert registry.load(name).unavailable("cuda")[-1].startswith("ROCm: ")


@pytest.mark.parametrize(("d", "refused"), [(8192, False), (8193, True), (16_384, True)])
def test_numba_counts_pieces_in_32_bits(d: int, refused: bool) -> None:
    problem = Problem(n=64, v=2**21 - 1, d=d, e_dtype=BF16, c_dtype=BF16, device="cuda")
    reasons = registry.load("numba").unsupported(problem, resolve(cce.Spec(filter="none"), problem))
    assert bool(reasons) == refused
    if refused:
        assert reasons == [f"c of 2097151 x {d} takes 2**35 bytes or more: its kernels cannot count them"]
