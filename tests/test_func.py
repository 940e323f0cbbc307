"""The transforms of ``torch.func`` on the loss, against the same transforms of the dense formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

import cce

pytestmark = pytest.mark.usefixtures("one_thread")
B, N, D, V = 3, 5, 4, 19
RNG = torch.Generator().manual_seed(0)
E, C, BIAS = (torch.randn(*shape, generator=RNG, dtype=torch.float64) for shape in ((B, N, D), (V, D), (V,)))
TARGETS = torch.randint(V, (B, N), generator=RNG)
TARGETS[1, 2], TARGETS[2, :3] = -100, -100
FILTERED = cce.Spec(filter="element", threshold=0.04, block_n=2, block_v=4)

# As it sets up forward mode, in torch 2.13.
torchs_own_warning = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
Loss = Callable[..., Tensor]


def dense(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(e, c, bias).movedim(-1, 1), targets, **options)


TRANSFORMS: dict[str, Callable[[Loss], Any]] = {
    "grad": lambda f: grad(lambda e, c, b: f(e, c, TARGETS, b), argnums=(0, 1, 2))(E, C, BIAS),
    "grad-and-value": lambda f: grad_and_value(lambda c: f(E, c, TARGETS))(C),
    "smoothing": lambda f: grad(lambda c: f(E, c, TARGETS, label_smoothing=0.2))(C),
    "vjp": lambda f: vjp(lambda c: f(E, c, TARGETS, reduction="none"), C)[1](E[..., 0])[0],
    "jacrev": lambda f: jacrev(lambda c: f(E, c, TARGETS, reduction="none"))(C),
    "vmap": lambda f: vmap(lambda e, t: f(e, C, t))(E, TARGETS),
    "vmap-of-the-classifier": lambda f: vmap(lambda c: f(E, c, TARGETS))(torch.stack([C, 2 * C])),
    "vmap-of-a-later-dimension": lambda f: vmap(lambda e, t: f(e, C, t), in_dims=(1, 1))(E, TARGETS),
    "gradients-of-samples": lambda f: vmap(grad(lambda c, e, t: f(e, c, t)), (None, 0, 0))(C, E, TARGETS),
    "gradient-through-vmap": lambda f: grad(lambda c: vmap(lambda e, t: f(e, c, t))(E, TARGETS).square().sum())(C),
    "vmap-of-vmap": lambda f: vmap(vmap(lambda e, t, c: f(e[None], c, t[None]), (0, 0, None)), (0, 0, None))(
        E[:2, :2], TARGETS[:2, :2], C
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform: Callable[[Loss], Any]) -> None:
    found, expected = transform(cce.loss), transform(dense)
    pairs = list(zip(found, expected, strict=True)) if isinstance(found, tuple) else [(found, expected)]
    for x, y in pairs:
        assert x.shape == y.shape and (x - y).norm() <= 1e-12 * y.norm()


def test_filtered() -> None:
    """The maps of the forward reach the backward of a transform."""
    c = C.clone().requires_grad_()
    expected = torch.autograd.grad(cce.loss(E, c, TARGETS, spec=FILTERED, z_loss=0.1), c)[0]
    found = grad(lambda c: cce.loss(E, c, TARGETS, spec=FILTERED, z_loss=0.1))(C)
    exact = grad(lambda c: cce.loss(E, c, TARGETS, z_loss=0.1))(C)
    assert torch.equal(found, expected) and not torch.equal(found, exact)


def test_terms() -> None:
    def entropy(e: Tensor) -> Tensor:
        found = cce.terms(e, C, TARGETS, outputs=("entropy",)).entropy
        assert found is not None
        return found.sum()

    p = F.linear(E, C).softmax(-1)
    log_p, used = p.log(), (TARGETS >= 0)[..., None]
    dz = -p * (log_p - (p * log_p).sum(-1, keepdim=True)) * used
    assert (grad(entropy)(E) - dz @ C).norm() <= 1e-12 * dz.norm() * C.norm()


def test_functional_call() -> None:
    """Gradients with respect to the parameters of a module, as an optimizer in the style of JAX wants them."""
    head = cce.LinearCrossEntropy(D, V, bias=True, dtype=torch.float64)
    parameters = {"weight": C, "bias": BIAS}
    found = grad(lambda p: functional_call(head, p, (E, TARGETS)))(parameters)
    expected = grad(lambda p: dense(E, p["weight"], TARGETS, p["bias"]))(parameters)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_of_a_compiled_function() -> None:
    torch._dynamo.reset()
    fast = torch.compile(lambda c: cce.loss(E, c, TARGETS), backend="aot_eager")
    expected = grad(lambda c: dense(E, c, TARGETS))(C)
    assert (grad(fast)(C) - expected).norm() <= 1e-12 * expected.norm()


def test_bad_target() -> None:
    with pytest.raises(ValueError, match=f"targets: got {V + 2}"):
        grad(lambda c: cce.loss(E, c, torch.full((B, N), V + 2)))(C)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_derivative(reduction: str) -> None:
    def gradient(c: Tensor) -> Tensor:
        return grad(lambda c: cce.loss(E, c, TARGETS, reduction=reduction).sum())(c)

    with pytest.raises(RuntimeError, match=r"second derivatives.*torch.nn.functional.cross_entropy"):
        grad(lambda c: gradient(c).square().sum())(C)


def dual(loss: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(C, C))


FORWARD_MODE = {
    "jvp": lambda f: jvp(f, (C,), (C,)),
    "hessian": lambda f: hessian(f)(C),
    "dual": dual,
}


@torchs_own_warning
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("transform", FORWARD_MODE.values(), ids=FORWARD_MODE)
def test_forward_mode(transform: Callable[[Any], Any], reduction: str) -> None:
    """An error that names what is there, instead of a tangent of 0."""
    with pytest.raises(RuntimeError, match=r"forward-mode.*torch.func.grad"):
        transform(lambda c: cce.loss(E, c, TARGETS, reduction=reduction).sum())


@torchs_own_warning
@pytest.mark.parametrize("transform", [grad, lambda f: lambda c: jvp(f, (c,), (c,))[1]], ids=["grad", "jvp"])
def test_inside_of_compiled_code(transform: Any) -> None:
    """Refused with a word on what to do."""
    torch._dynamo.reset()
    fast = torch.compile(transform(lambda c: cce.loss(E, c, TARGETS)), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="transform a compiled function"):
        fast(C)
