"""The stand-in for logits: each operation it follows gives the loss and the gradients of the dense one, in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cce.integrations.transformers.logits import Call, Logits
from cce.integrations.transformers.product import Product

pytestmark = pytest.mark.usefixtures("one_thread")
B, L, D, V = 3, 5, 7, 23


class Inputs:
    """What a model's last lines work with."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.e, self.c, self.bias = make(B, L, D), make(V, D), make(V)
        self.h, self.b = make(B, L, 2), make(V, 2)
        self.factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        self.targets = torch.randint(V, (B, L), generator=generator)
        self.targets[0, :2] = self.targets[2, 4] = -100
        self.weight = torch.rand(V, generator=generator, dtype=torch.float64)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.e, self.c, self.bias, self.h, self.b, self.factor]


def lazy(e: Tensor, c: Tensor, bias: Tensor | None = None, **options: Any) -> Logits:
    return Logits(Product(e, c, bias), e.dtype, Call("Model", options))


def flat(x: Inputs, z: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(z.view(-1, z.shape[-1]), x.targets.view(-1), **options)


Make = Callable[..., Any]  # F.linear, or the stand-in
CASES: dict[str, Callable[[Inputs, Make], Tensor]] = {
    "plain": lambda x, f: flat(x, f(x.e, x.c)),
    "sum": lambda x, f: flat(x, f(x.e, x.c), reduction="sum"),
    "none": lambda x, f: flat(x, f(x.e, x.c), reduction="none").square().sum(),
    "bias": lambda x, f: flat(x, f(x.e, x.c, x.bias)),
    "softcap": lambda x, f: flat(x, torch.tanh(f(x.e, x.c, x.bias) / 1.5) * 1.5),
    "softcap-F": lambda x, f: flat(x, F.tanh(f(x.e, x.c) / 1.5) * 1.5),
    "softcap-method": lambda x, f: flat(x, 1.5 * (f(x.e, x.c) * (1 / 1.5)).tanh()),
    "softcap-scaled": lambda x, f: flat(x, torch.tanh(0.3 * f(x.e, x.c, x.bias)) * 4 / 2),
    "scaled": lambda x, f: flat(x, 0.3 * f(x.e, x.c, x.bias)),
    "divided": lambda x, f: flat(x, f(x.e, x.c, x.bias) / 3),
    "functions": lambda x, f: flat(x, torch.div(torch.mul(f(x.e, x.c), 2), 3)),
    "learned-scale": lambda x, f: flat(x, f(x.e, x.c, x.bias) * x.factor),
    "learned-divisor": lambda x, f: flat(x, f(x.e, x.c) / x.factor.view(1, 1)),
    "added-bias": lambda x, f: flat(x, f(x.e, x.c) + x.bias),
    "two-biases": lambda x, f: flat(x, x.bias[None] + 2 * f(x.e, x.c, x.bias)),
    "two-products": lambda x, f: flat(x, f(x.e, x.c) + 3 * f(x.h, x.b)),
    "two-products-and-biases": lambda x, f: flat(x, 0.5 * f(x.e, x.c, x.bias) + 3 * f(x.h, x.b, x.bias)),
    "three-products": lambda x, f: flat(x, (f(x.e, x.c) + f(x.h, x.b) + f(x.h.sin(), x.b.cos())) / 2),
    "two-products-capped": lambda x, f: flat(x, torch.tanh((f(x.e, x.c) + f(x.h, x.b)) / 2) * 2),
    "casts": lambda x, f: flat(x, f(x.e, x.c).float().to(torch.float64).type(torch.float32).double()),
    "to": lambda x, f: flat(x, f(x.e, x.c).to("cpu").to(device="cpu", dtype=torch.float64).to(x.e).contiguous()),
    "reshape": lambda x, f: F.cross_entropy(f(x.e, x.c).reshape((B * L, V)), x.targets.flatten()),
    "flatten": lambda x, f: F.cross_entropy(f(x.e, x.c).flatten(0, 1), x.targets.flatten()),
    "size": lambda x, f: F.cross_entropy((z := f(x.e, x.c)).view(-1, z.size(-1)), x.targets.flatten()),
    "shifted": lambda x, f: F.cross_entropy(f(x.e, x.c)[..., :-1, :].reshape(-1, V), x.targets[:, 1:].flatten()),
    "rows": lambda x, f: F.cross_entropy(f(x.e, x.c, x.bias)[1:, 2:].flatten(0, 1), x.targets[1:, 2:].flatten()),
    "entries": lambda x, f: flat(x, f(x.e, torch.cat([x.c, x.c]), torch.cat([x.bias, x.bias]))[..., :V]),
    "module": lambda x, f: nn.CrossEntropyLoss()(f(x.e, x.c).view(-1, V), x.targets.view(-1)),
    "ignore-index": lambda x, f: F.cross_entropy(
        f(x.e, x.c).view(-1, V), x.targets.clamp(min=0).view(-1), ignore_index=0
    ),
    "smoothing": lambda x, f: flat(x, f(x.e, x.c), label_smoothing=0.2),
    "weight": lambda x, f: flat(x, f(x.e, x.c), weight=x.weight),
}


@pytest.mark.parametrize("name", CASES)
def test_followed(name: str) -> None:
    x = Inputs()
    found, expected = CASES[name](x, lazy), CASES[name](x, F.linear)
    assert found.dtype == expected.dtype and type(found) is Tensor
    # The cast to float32 rounds the dense logits.
    tolerance = 1e-6 if name == "casts" else 1e-12
    assert abs(found - expected) <= tolerance * abs(expected)
    grads = [torch.autograd.grad(z, x.leaves, allow_unused=True) for z in (found, expected)]
    for got, want in zip(*grads, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_loss_has_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    x = Inputs()
    assert flat(x, lazy(x.e, x.c).to(dtype)).dtype == dtype


def test_it_tells_what_it_stands_for() -> None:
    x = Inputs()
    z, dense = lazy(x.e, x.c), F.linear(x.e, x.c)
    for ask in (len, Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous):
        assert ask(z) == ask(dense)
    assert (z.shape, z.dtype, z.device, z.ndim) == (dense.shape, dense.dtype, dense.device, 3)
    assert repr(z) == "Logits(shape=(3, 5, 23), dtype=torch.float64, not computed)"


def test_options() -> None:
    x = Inputs()
    z = lazy(x.e, x.c, label_smoothing=0.2, weight=x.weight, z_loss=0.01)
    expected = flat(x, F.linear(x.e, x.c), label_smoothing=0.2, weight=x.weight)
    lse = F.linear(x.e, x.c).logsumexp(-1)[x.targets >= 0]
    expected = expected + 0.01 * lse.square().sum() / x.weight[x.targets[x.targets >= 0]].sum()
    assert abs(flat(x, z) - expected) <= 1e-12 * expected


REFUSED: dict[str, Callable[[Inputs, Tensor], Any]] = {
    "softmax": lambda x, z: z.softmax(-1),
    "logsumexp": lambda x, z: torch.logsumexp(z, dim=-1),
    "argmax": lambda x, z: z.argmax(-1),
    "sum": lambda x, z: z.sum(),
    "mul": lambda x, z: z * x.weight,
    "sub": lambda x, z: z - z,
    "neg": lambda x, z: -z,
    "add": lambda x, z: z + F.linear(x.e, x.c),
    "tanh": lambda x, z: torch.tanh(torch.tanh(z)),
    "mul_": lambda x, z: z.mul_(2),
    "div_": lambda x, z: z.div_(2),
    "__rdiv__": lambda x, z: 2 / z,
    "__setitem__": lambda x, z: z.__setitem__((..., 3), 0),
    "__getitem__": lambda x, z: z[:, 0],
    "transpose": lambda x, z: z.transpose(1, 2),
    "to": lambda x, z: z.to("meta"),
    "long": lambda x, z: z.long(),
    "detach": lambda x, z: z.detach(),
    "linear": lambda x, z: F.linear(z, x.c.T),
    "cross_entropy": lambda x, z: F.cross_entropy(z.flatten(0, 1), z.flatten(0, 1)),
    "where": lambda x, z: torch.where(x.weight > 0, z, 0.0),
    "stack": lambda x, z: torch.stack([z, z]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    x = Inputs()
    with pytest.raises(ValueError, match=r"Model calls \w+\(.*\) on its logits.*expected only .*unpatch") as caught:
        REFUSED[name](x, lazy(x.e, x.c))
    assert f"calls {name}(" in str(caught.value)


def test_refused_after_tanh() -> None:
    """What would have to go into the tanh."""
    x = Inputs()
    z = torch.tanh(lazy(x.e, x.c))
    for use in (lambda: z + x.bias, lambda: z + z, lambda: z * x.factor):
        with pytest.raises(ValueError, match="on its logits"):
            use()


def test_the_import_needs_no_transformers() -> None:
    """Only patch does, and it says so (test_transformers_patch.py)."""
    code = "import sys, cce.integrations.transformers; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_bad_numbers() -> None:
    x = Inputs()
    z = lazy(x.e, x.c)
    with pytest.raises(ValueError, match=r"Model divides its logits by 0, expected a number other than 0"):
        z / 0
    with pytest.raises(ValueError, match=r"logit_scale: got -2.0, expected a finite number > 0"):
        flat(x, z * -2)
    with pytest.raises(
        ValueError, match=r"vocab_size: Model .* shape \(3, 5, 23\) the shape \(-1, 20\), expected .* 23"
    ):
        z.view(-1, 20)


def test_an_option_of_patch_and_of_the_model() -> None:
    x = Inputs()
    with pytest.raises(ValueError, match=r"label_smoothing: got one in patch, expected none, as Model has one"):
        flat(x, lazy(x.e, x.c, label_smoothing=0.1), label_smoothing=0.3)
    with pytest.raises(ValueError, match="weight: got one in patch, expected none"):
        flat(x, lazy(x.e, x.c, weight=x.weight), weight=x.weight)
