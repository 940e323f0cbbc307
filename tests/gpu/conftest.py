"""Tests that need a CUDA device: ``python -m pytest tests/gpu -m gpu -q``."""

from __future__ import annotations

import os

import pytest
import torch

from cce import registry

#: CCE_GPU_BACKENDS="cupy" tests that one alone.
BACKENDS = os.environ.get("CCE_GPU_BACKENDS", "triton cupy numba").split()


@pytest.fixture(autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend with kernels, if what it needs is there."""
    name: str = request.param
    reasons = registry.load(name).unavailable("cuda")
    if reasons:
        pytest.skip("; ".join(reasons))
    return name
