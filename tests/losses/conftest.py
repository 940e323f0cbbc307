"""A small problem in float64 with its logits, and what "the same, with all gradients" means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

B, L, D, V = 3, 5, 4, 11


@dataclass(frozen=True, repr=False)
class Problem:
    """Inputs that require a gradient, and options of ``cce.terms``."""

    e: Tensor  # (B, L, D)
    c: Tensor  # (V, D)
    bias: Tensor  # (V,)
    targets: Tensor  # (B, L), some ignored
    options: dict[str, Any]  # of cce.terms

    @property
    def call(self) -> dict[str, Any]:
        """The options as a recipe takes them."""
        return {**self.options, **({"bias": self.bias} if self.biased else {})}

    @property
    def biased(self) -> bool:
        return "softcap" in self.options

    @property
    def shift(self) -> int:
        return self.options.get("shift", 0)

    @property
    def ignore_index(self) -> int:
        return self.options.get("ignore_index", -100)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.e, self.c, *([self.bias] if self.biased else [])]

    @property
    def labels(self) -> Tensor:
        """(B, L - shift) of the results' shape."""
        return self.targets[:, self.shift :]

    @property
    def in_use(self) -> Tensor:
        return self.labels != self.ignore_index

    def logits(self, temperature: float = 1.0) -> Tensor:
        """(B, L - shift, V), dense."""
        z = self.e @ self.c.T + (self.bias if self.biased else 0)
        z = z * self.options.get("logit_scale", 1.0)
        softcap = self.options.get("softcap")
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return z[:, : L - self.shift] / temperature

    def p(self, temperature: float = 1.0) -> Tensor:
        """(B, L - shift) probability of the target; of entry 0 where there is none."""
        return self.take(self.logits(temperature).softmax(-1), self.labels)

    @staticmethod
    def take(of_entries: Tensor, labels: Tensor) -> Tensor:
        return of_entries.gather(-1, labels.clamp(min=0)[..., None])[..., 0]

    def token_weight(self) -> Tensor:
        return draw(B, L, seed=7).abs().requires_grad_()

    def reduce(self, values: Tensor, reduction: str, token_weight: Tensor | None = None) -> Tensor:
        """By the documentation of ``cce.loss``."""
        weight = torch.ones_like(values) if token_weight is None else token_weight[:, self.shift :]
        weight = weight * self.in_use
        if reduction == "none":
            return weight * values
        return (weight * values).sum() / (weight.sum() if reduction == "mean" else 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"shift": 1, "softcap": 2.5, "logit_scale": 0.7, "ignore_index": 0},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def problem(request: pytest.FixtureRequest, one_thread: None) -> Problem:
    options = request.param
    targets = torch.randint(1, V, (B, L), generator=torch.Generator().manual_seed(3))
    ignore_index = options.get("ignore_index", -100)
    targets[0, 3:] = ignore_index
    targets[1, 1] = ignore_index
    e, c, bias = (x.requires_grad_() for x in (1.5 * draw(B, L, D), draw(V, D), draw(V)))
    return Problem(e, c, bias, targets, options)


@pytest.fixture
def same() -> Callable[..., None]:
    """``same(found, expected, inputs)``: values, then the gradients of ``inputs`` for upstream gradients of order 1."""

    def check(found: Tensor, expected: Tensor, inputs: list[Tensor], bound: float = 1e-10) -> None:
        assert found.shape == expected.shape
        close(found, expected, bound, "value")
        upstream = draw(*expected.shape, seed=11).to(expected.dtype)
        grads = [torch.autograd.grad(x, inputs, upstream, retain_graph=True) for x in (found, expected)]
        for i, (x, y) in enumerate(zip(*grads, strict=True)):
            close(x, y, bound, f"gradient of input {i}")

    return check


def close(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    error, norm = float((found - expected).norm()), float(expected.norm())
    assert norm > 0, f"{what}: nothing to compare with"
    assert error <= bound * norm, f"{what}: error {error:.3g} at a norm of {norm:.3g}"
