"""Tests that need a CUDA device: ``python -m pytest tests/gpu -m gpu -q``."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(params=["triton", "cupy"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend whose kernels are this package's own, where it can run."""
    from cce import registry

    reasons = registry.load(request.param).unavailable("cuda") if torch.cuda.is_available() else ["no CUDA device"]
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param
