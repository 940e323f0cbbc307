"""What a spec whose filter is left open becomes, by dtype, device and size."""

from __future__ import annotations

import pytest
import torch

import cce
from cce.problem import Problem

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("device", "dtype", "n", "expected"),
    [
        ("cpu", BF16, 64, "element"),
        ("cpu", F32, 64, "none"),
        ("cuda", BF16, 64, "none"),  # all logits fit into the scratch memory
        ("cuda", BF16, 8192, "element"),
        ("cuda", F32, 8192, "none"),
        ("mps", BF16, 8192, "none"),  # no kernels of this package
        ("xpu", BF16, 8192, "none"),
    ],
)
def test_filter(device: str, dtype: torch.dtype, n: int, expected: str) -> None:
    problem = Problem(n=n, v=50_000, d=64, e_dtype=dtype, c_dtype=dtype, device=device, grad_e=True, grad_c=True)
    assert cce.Spec().resolve(problem).filter == expected
    assert cce.Spec(filter="element").resolve(problem).filter == "element"  # what is asked for is done


def test_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    problem = Problem(n=8191, v=50_000, d=64, e_dtype=BF16, c_dtype=BF16, device="cuda", grad_e=True, grad_c=True)
    assert cce.Spec().resolve(problem).filter == "none"
