"""Tests that need a CUDA device: ``python -m pytest tests/gpu -m gpu -q``."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"
