"""The kernels one by one, held to the contract of ``cce.testing.kernels``, with matrices that are not aligned."""

from __future__ import annotations

from typing import Any

import pytest

from cce.backends.triton.launches import TritonKernels
from cce.testing.kernels import contract, one_pass_contract


@pytest.mark.parametrize("case", contract.CASES, ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
def test_kernels(case: Any) -> None:
    _, passed, message = contract.run_case(TritonKernels(), case, "cpu", small=True)
    assert passed and not message, message


@pytest.mark.parametrize("case", one_pass_contract.CASES, ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_pass(case: Any) -> None:
    _, passed, message = one_pass_contract.run_case(TritonKernels().one_pass(), case, "cpu")
    assert passed, message
