"""Operators are made without torch's compiler, and closed to it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from cce import operators


def test_a_step_imports_no_compiler() -> None:
    """It takes seconds, and a first call would take them."""
    code = """if True:
        import sys, torch, cce
        cce.loss(torch.ones(2, 3, requires_grad=True), torch.ones(4, 3), torch.arange(2)).backward()
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


@pytest.mark.parametrize("closed", [True, False])
def test_the_compiler_does_not_look_inside(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it has given up on the function that calls the operator: it would try those within."""
    if not closed:
        monkeypatch.setattr(operators, "_unseen", lambda function: function)
    name = f"cce_test::twice_{closed}"
    operator, graphs = operators.operator(name)(twice), []
    operators.fake(name)(torch.empty_like)

    def given_up(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.skip_frame()
        return operator(x)

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    assert torch.equal(torch.compile(given_up, backend=keep)(torch.ones(2)), torch.full((2,), 2.0))
    assert len(graphs) == (0 if closed else 1)


def test_an_operator_is_checked_by_torch() -> None:
    """Schema, autograd, shapes without values, and what is compiled."""
    name = "cce_test::checked"
    operator = operators.operator(name)(twice)
    operators.fake(name)(torch.empty_like)
    torch.library.register_autograd(name, lambda ctx, grad: grad + grad)
    torch.library.opcheck(operator, (torch.ones(3, requires_grad=True),))
