"""Every backend's kernels one by one, held to the contract of ``cce.testing.kernels``."""

from __future__ import annotations

from typing import Any

import pytest

from cce import registry
from cce.backends.gpu.backend import KernelBackend
from cce.backends.gpu.kernels import Kernels
from cce.testing.kernels import contract, one_pass_contract


def kernels_of(backend: str) -> Kernels:
    found = registry.load(backend)
    assert isinstance(found, KernelBackend)
    return found.kernels()


@pytest.mark.parametrize("case", contract.CASES, ids=str)
def test_kernels(backend: str, case: Any) -> None:
    _, passed, message = contract.run_case(kernels_of(backend), case, "cuda")
    assert passed, message


@pytest.mark.parametrize("case", one_pass_contract.CASES, ids=str)
def test_one_pass(backend: str, case: Any) -> None:
    kernels = kernels_of(backend).one_pass()
    if kernels is None:
        pytest.skip("it has no pass that computes gradients along with the loss")
    _, passed, message = one_pass_contract.run_case(kernels, case, "cuda")
    assert passed, message
