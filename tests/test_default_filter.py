"""What a spec whose filter and threshold are left open becomes, by dtype, device and size."""

from __future__ import annotations

import pytest
import torch

import cce
from cce import ops
from cce.parallel import Part
from cce.problem import Problem

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("device", "dtype", "n", "d", "expected"),
    [
        ("cpu", BF16, 64, 64, "element"),
        ("cpu", F32, 64, 64, "none"),
        ("cuda", BF16, 64, 2**20, "none"),  # all logits fit into the scratch memory
        ("cuda", BF16, 8192, 2048, "element"),
        ("cuda", BF16, 8192, 1024, "none"),  # the products are too short
        ("cuda", F32, 8192, 2048, "none"),
        ("mps", BF16, 8192, 2048, "none"),  # no kernels of this package
        ("xpu", BF16, 8192, 2048, "none"),
    ],
)
def test_filter(device: str, dtype: torch.dtype, n: int, d: int, expected: str) -> None:
    problem = Problem(n=n, v=50_000, d=d, e_dtype=dtype, c_dtype=dtype, device=device, grad_e=True, grad_c=True)
    assert cce.Spec().resolve(problem).filter == expected
    assert cce.Spec(filter="element").resolve(problem).filter == "element"  # what is asked for is done


def test_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    problem = Problem(n=8191, v=50_000, d=64, e_dtype=BF16, c_dtype=BF16, device="cuda", grad_e=True, grad_c=True)
    assert cce.Spec().resolve(problem).filter == "none"


@pytest.mark.parametrize(
    ("v", "dtype", "expected"),
    [
        (2**15, BF16, 2**-13),
        (256_000, BF16, 12 / 256_000),  # a multiple of the uniform probability
        (256_000, torch.float16, 2**-16),
        (2**20, torch.float16, 12 / 2**20),
    ],
)
def test_threshold(v: int, dtype: torch.dtype, expected: float) -> None:
    problem = Problem(n=8, v=v, d=8, e_dtype=dtype, c_dtype=dtype)
    assert cce.Spec().resolve(problem).threshold == expected
    assert cce.Spec(threshold=0.5).resolve(problem).threshold == 0.5


def test_threshold_of_a_part() -> None:
    order = cce.Spec(vocab_order=[1, 0])
    for spec in (cce.Spec(), order):
        part = spec.of_vocabulary(256_000, BF16)
        assert part.threshold == 12 / 256_000
        assert part.vocab_order is spec.vocab_order
    assert cce.Spec(threshold=0.5).of_vocabulary(256_000, BF16).threshold == 0.5
    problem = Problem(n=8, v=100, d=8, e_dtype=BF16, c_dtype=BF16)
    part = Part("group", first=100, sizes=(255_900, 100))
    assert ops._resolved(cce.Spec().key, problem, part.key).threshold == 12 / 256_000
    assert ops._resolved(cce.Spec().key, problem, "").threshold == 2**-13
