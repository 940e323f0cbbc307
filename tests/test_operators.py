"""Operators are made without torch's compiler, and closed to it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import cce
from cce import torch_private
from cce.backends.shared.targets import prepare
from cce.frontend import operators
from cce.frontend.decision import Request


def test_a_step_imports_no_compiler() -> None:
    """It takes seconds, and a first call would take them."""
    code = """if True:
        import sys, torch, cce
        cce.loss(torch.ones(2, 3, requires_grad=True), torch.ones(4, 3), torch.arange(2)).backward()
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def itself(x: torch.Tensor) -> torch.Tensor:
    return x


def twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


@pytest.mark.parametrize("closed", [True, False])
def test_the_compiler_does_not_look_inside(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it has given up on the function that calls the operator: it would try those within."""
    if not closed:
        monkeypatch.setattr(torch_private, "_unseen", lambda function: function)
    name = f"cce_test::twice_{closed}"
    operator, graphs = torch_private.operator(name)(twice), []
    torch_private.fake(name)(torch.empty_like)

    def given_up(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.skip_frame()
        return operator(x)

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    assert torch.equal(torch.compile(given_up, backend=keep)(torch.ones(2)), torch.full((2,), 2.0))
    assert len(graphs) == (0 if closed else 1)


def test_modules_can_be_imported_again() -> None:
    """As a notebook does after a change."""
    code = """if True:
        import sys, torch, cce
        for name in [name for name in sys.modules if name.split(".")[0] == "cce"]:
            del sys.modules[name]
        import cce
        e, c = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)
        cce.loss(e, c, torch.arange(2), spec=cce.Spec(filter="none")).backward()
        assert e.grad is not None
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_operators_are_checked_by_torch() -> None:
    """Schema, that no result is an argument, autograd, shapes without values, and what is compiled."""
    rng = torch.Generator().manual_seed(0)
    e, c = (torch.randn(*size, generator=rng, requires_grad=True) for size in ((6, 4), (9, 4)))
    labels = torch.tensor([0, 8, -100, 3, 3, 1])
    torch.library.opcheck(operators.prepare_targets, (labels[:, None], 9, -100))
    targets = prepare(labels[:, None], 9, -100)
    request = Request("torch", cce.Spec(filter="none").key, None, 1.0, "entropy", "e,c")
    options = (torch.tensor(0.5, dtype=torch.float64), request.key)
    torch.library.opcheck(operators.forward, (e, c, None, targets, None, None, *options))
    found = operators.forward(e, c, None, targets, None, None, *options)
    lse, nll, lse_low, entropy, _, _, *maps, _ = (x.detach() for x in found)
    upstream = [torch.ones_like(lse), torch.ones_like(nll), torch.ones_like(entropy), e.new_empty(0)]
    tensors = (e.detach(), c.detach(), None, targets, None, None, [lse, nll, lse_low, entropy, *maps], upstream)
    torch.library.opcheck(operators.backward, (*tensors, *options, "e,c"))


def test_a_result_that_is_an_argument_is_found() -> None:
    """What these checks are for: here nothing looks at it when an operator is called."""
    name = "cce_test::same"
    same = torch_private.operator(name)(itself)
    torch_private.fake(name)(torch.empty_like)
    with pytest.raises(Exception, match="alias"):
        torch.library.opcheck(same, (torch.ones(3),))
