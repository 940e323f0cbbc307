"""``LinearCrossEntropy`` stands where ``nn.Linear`` stood."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cce

D, V = 8, 21


@pytest.fixture
def e() -> Tensor:
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(2))


def weights(requires_grad: bool = False) -> Tensor:
    return torch.linspace(0.5, 2, V).requires_grad_(requires_grad)


@pytest.mark.parametrize("bias", [False, True])
def test_initial_values_are_those_of_linear(bias: bool) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(D, V, bias=bias)
    torch.manual_seed(3)
    head = cce.LinearCrossEntropy(D, V, bias=bias)
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert all(torch.equal(x, linear.state_dict()[name]) for name, x in head.state_dict().items())
    assert [(n, p.shape, p.requires_grad) for n, p in head.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in linear.named_parameters()
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_loads_the_state_of_linear(e: Tensor, targets: Tensor, bias: bool) -> None:
    """Strictly, with class weights too, and back again."""
    linear, head = nn.Linear(D, V, bias=bias), cce.LinearCrossEntropy(D, V, bias=bias, weight=weights())
    head.load_state_dict(linear.state_dict())
    expected = F.cross_entropy(linear(e).flatten(0, 1), targets.flatten(), weights())
    torch.testing.assert_close(head(e, targets), expected)
    linear.load_state_dict(head.state_dict())


def test_gradients_are_those_of_linear(e: Tensor, targets: Tensor) -> None:
    linear, head = nn.Linear(D, V), cce.LinearCrossEntropy(D, V, bias=True)
    head.load_state_dict(linear.state_dict())
    head(e, targets).backward()
    de, e.grad = e.grad, None
    F.cross_entropy(linear(e).mT, targets).backward()
    torch.testing.assert_close(de, e.grad)
    torch.testing.assert_close(head.weight.grad, linear.weight.grad)
    torch.testing.assert_close(head.bias.grad, linear.bias.grad)


def test_ties_its_weight_with_an_embedding(targets: Tensor) -> None:
    """The embedding gets the gradients of both uses, and one step moves both."""
    embedding, head = nn.Embedding(V, D), cce.LinearCrossEntropy(D, V)
    head.weight = embedding.weight
    head(embedding(targets), targets.roll(1, 1)).backward()
    table = embedding.weight.detach().requires_grad_()
    F.cross_entropy(F.linear(table[targets], table).mT, targets.roll(1, 1)).backward()
    torch.testing.assert_close(embedding.weight.grad, table.grad)
    assert len(set(nn.ModuleList([embedding, head]).parameters())) == 1


OPTIONS: dict[str, dict[str, Any]] = {
    "ignore_index": {"ignore_index": 4},
    "reduction": {"reduction": "none"},
    "shift": {"shift": 1},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.3},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "weight": {"weight": weights()},
    "backend": {"backend": "reference"},
    "spec": {"spec": cce.Spec(filter="element", threshold=0.4, block_n=1, block_v=2, compensate=False)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_reach_the_loss(e: Tensor, targets: Tensor, options: dict[str, Any]) -> None:
    head = cce.LinearCrossEntropy(D, V, bias=True, **options)
    targets[0, 1] = options.get("ignore_index", -100)
    found, expected = head(e, targets), cce.loss(e, head.weight, targets, head.bias, **options)
    plain = cce.loss(e, head.weight, targets, head.bias)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(x.sum(), e)[0] for x in (found, expected, plain)]
    assert torch.equal(grads[0], grads[1])
    assert "backend" in options or not torch.equal(grads[0], grads[2]), "the option changes nothing: this tests nothing"


@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_a_call(e: Tensor, targets: Tensor, soft: bool) -> None:
    head, token_weight = cce.LinearCrossEntropy(D, V), torch.rand(3, 5)
    given: dict[str, Tensor] = {"token_weight": token_weight}
    if soft:
        targets, given["target_weight"] = targets[..., None].expand(3, 5, 2).clone(), torch.rand(3, 5, 2)
    assert torch.equal(head(e, targets, **given), cce.loss(e, head.weight, targets, **given))
    assert not torch.equal(head(e, targets, **given), head(e, targets, **{**given, "token_weight": None}))


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="smoothing"):
        cce.LinearCrossEntropy(D, V, smoothing=0.1)


BAD_OPTIONS: list[tuple[str, Any]] = [
    ("reduction", "avg"),
    ("softcap", -1),
    ("logit_scale", 0),
    ("label_smoothing", 1.1),
    ("z_loss", -1.0),
    ("ignore_index", 0.5),
    ("shift", -1),
    ("backend", "gpu"),
    ("spec", "exact"),
    ("spec.vocab_order", cce.Spec(vocab_order=range(V + 1))),
    ("weight", torch.ones(V + 1)),
    ("weight", weights(requires_grad=True)),
    ("vocab_parallel", 2),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=str)
def test_bad_options_are_errors_at_once(name: str, value: Any) -> None:
    """Not at the first forward, which may be hours later."""
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: got .*expected"):
        cce.LinearCrossEntropy(D, V, **{name.partition(".")[0]: value})


def test_class_weights_move_with_the_module(e: Tensor, targets: Tensor) -> None:
    head = cce.LinearCrossEntropy(D, V, bias=True, weight=weights())
    assert head.to("meta").class_weight.device.type == "meta"
    head = cce.LinearCrossEntropy(D, V, bias=True, weight=weights()).double()
    assert {head.weight.dtype, head.bias.dtype, head.class_weight.dtype} == {torch.float64}
    assert head(e.double(), targets).dtype == torch.float64
    assert "class_weight" not in head.state_dict()


def test_dtype_and_device_of_the_parameters() -> None:
    head = cce.LinearCrossEntropy(D, V, bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in head.parameters()} == {(torch.bfloat16, "meta")}


def _pickled(head: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(head))


def _saved(head: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("spec", [None, cce.Spec(filter="tile", block_v=8), cce.Spec(vocab_order=range(V))], ids=str)
def test_copies(e: Tensor, targets: Tensor, spec: cce.Spec | None, duplicate: Any) -> None:
    """A copy computes the same and shares no parameter."""
    head = cce.LinearCrossEntropy(D, V, bias=True, spec=spec, weight=weights(), label_smoothing=0.1)
    other = duplicate(head)
    assert torch.equal(other(e, targets), head(e, targets))
    assert other.options["spec"] == spec
    with torch.no_grad():
        other.weight.zero_()
    assert head.weight.any()


def test_repr() -> None:
    head = cce.LinearCrossEntropy(D, V, bias=True, softcap=30.0, backend="torch")
    expected = f"LinearCrossEntropy(in_features={D}, out_features={V}, bias=True, softcap=30.0, backend='torch')"
    assert repr(head) == expected
    assert repr(cce.LinearCrossEntropy(D, V)) == f"LinearCrossEntropy(in_features={D}, out_features={V}, bias=False)"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("logit_scale", [1.0, 0.4])
def test_logits(e: Tensor, targets: Tensor, logit_scale: float, softcap: float | None, bias: bool) -> None:
    """Those of the formula, and those the loss is the cross-entropy of."""
    head = cce.LinearCrossEntropy(D, V, bias=bias, softcap=softcap, logit_scale=logit_scale)
    z = logit_scale * F.linear(e, head.weight, head.bias)
    torch.testing.assert_close(head.logits(e), z if softcap is None else softcap * torch.tanh(z / softcap))
    torch.testing.assert_close(F.cross_entropy(head.logits(e).mT, targets), head(e, targets))


def test_logits_of_masked_entries(e: Tensor, targets: Tensor) -> None:
    """A bias of -inf masks an entry under a softcap, too, in the logits as in the loss."""
    head = cce.LinearCrossEntropy(D, V, bias=True, softcap=1.5)
    with torch.no_grad():
        head.bias[3] = -torch.inf
    z = head.logits(e)
    assert (z[..., 3] == -torch.inf).all() and z[..., 4:].isfinite().all()
    targets = targets.masked_fill(targets == 3, 4)
    torch.testing.assert_close(F.cross_entropy(z.mT, targets), head(e, targets))
    (g,) = torch.autograd.grad(z[..., 4:].sum(), head.bias)
    assert g.isfinite().all()


def test_functional_call(e: Tensor, targets: Tensor) -> None:
    """With parameters from elsewhere, which get the gradient."""
    head = cce.LinearCrossEntropy(D, V, bias=True)
    other = {"weight": torch.randn(V, D, requires_grad=True), "bias": torch.randn(V, requires_grad=True)}
    loss = torch.func.functional_call(head, other, (e, targets))
    assert torch.equal(loss, cce.loss(e, other["weight"], targets, other["bias"]))
    loss.backward()
    assert other["weight"].grad is not None and other["bias"].grad is not None and head.weight.grad is None


def test_trains(e: Tensor, targets: Tensor) -> None:
    """A few steps learn the batch by heart."""
    head = cce.LinearCrossEntropy(D, V)
    optimizer = torch.optim.Adam([head.weight, e], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = head(e, targets)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert torch.equal(head.logits(e).argmax(-1), targets)
