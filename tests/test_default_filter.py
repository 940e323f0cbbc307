"""What a spec whose filter and threshold are left open becomes, by dtype, device and size."""

from __future__ import annotations

import pytest
import torch

import cce
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.distributed.join import Part
from cce.frontend.decision import Request, described

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        (device, dtype)
        for device in ("cpu", "cuda", "mps", "xpu", "meta")
        for dtype in (BF16, torch.float16, F32, torch.float64)
    ],
)
def test_exact_unless_a_filter_is_asked_for(device: str, dtype: torch.dtype) -> None:
    problem = Problem(n=8192, v=50_000, d=2048, e_dtype=dtype, c_dtype=dtype, device=device, grad_e=True, grad_c=True)
    assert resolve(cce.Spec(), problem).filter == "none"
    assert resolve(cce.Spec(filter="element"), problem).filter == "element"


@pytest.mark.parametrize("filter", ["element", "tile"])
@pytest.mark.parametrize("output", ["lse", "entropy"])
def test_no_filter_of_what_it_would_leave_out(filter: str, output: str) -> None:
    """A gradient of lse or entropy is spread over entries that a filter takes for nothing: 90 % of it was lost."""
    e, c, spec = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3), cce.Spec(filter=filter)
    targets = torch.arange(4)
    with pytest.raises(ValueError, match=rf"^spec: got filter='{filter}' with outputs \['{output}'\]"):
        cce.terms(e, c, targets, outputs=["nll", output], spec=spec)
    cce.terms(e, c, targets, outputs=["nll"], spec=spec).nll.sum().backward()
    with torch.no_grad():
        cce.terms(e, c, targets, outputs=[output], spec=spec)


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
    assert resolve(cce.Spec(filter="element"), problem).threshold == expected
    assert resolve(cce.Spec(filter="element", threshold=0.5), problem).threshold == 0.5


def test_a_threshold_wants_a_filter() -> None:
    with pytest.raises(ValueError, match=r"^Spec.threshold: got 0.5 without a filter"):
        cce.Spec(threshold=0.5)


def test_threshold_of_a_part() -> None:
    plain, order = cce.Spec(filter="element"), cce.Spec(filter="element", vocab_order=[1, 0])
    problem = Problem(n=8, v=100, d=8, e_dtype=BF16, c_dtype=BF16)
    for spec in (plain, order):
        found = resolve(spec, problem, 256_000)
        assert found.threshold == 12 / 256_000
        assert found.permutation is spec.permutation
    assert resolve(cce.Spec(filter="tile", threshold=0.5), problem, 256_000).threshold == 0.5
    part = Part("group", first=100, sizes=(255_900, 100))
    e, c, targets = (torch.empty(*size, dtype=BF16, device="meta") for size in ((8, 8), (100, 8), (8, 1)))
    for key, threshold in ((part.key, 12 / 256_000), ("", 2**-13)):
        request = Request("torch", plain.key, None, 1.0, "", "e,c", key)
        assert described(e, c, None, targets, request)[1].threshold == threshold
