"""Bad input: a TypeError or ValueError that names the argument and its value, before anything is computed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import cce
from cce import registry
from cce.backends.torch import TorchBackend
from cce.errors import describe
from cce.reference.backend import ReferenceBackend

N, D, V, K = 4, 3, 7, 2
E = torch.ones(N, D, requires_grad=True)
C = torch.ones(V, D, requires_grad=True)
T = torch.arange(N)
SOFT = torch.zeros(N, K, dtype=torch.int64)
NAN, INF = math.nan, math.inf


class Bad(NamedTuple):
    """One kind of bad input: the arguments, and what the error must be and say."""

    id: str
    arguments: dict[str, Any]
    kind: type[Exception]
    name: str
    value: str


def tensors(name: str, **others: Any) -> list[Bad]:
    """What no tensor argument may be."""
    return [
        Bad(f"{name}-numpy", {name: np.ones((N, D)), **others}, TypeError, name, "ndarray"),
        Bad(f"{name}-list", {name: [[1.0, 2.0]], **others}, TypeError, name, "[[1.0, 2.0]]"),
        Bad(f"{name}-str", {name: "logits", **others}, TypeError, name, "'logits'"),
        Bad(f"{name}-sparse", {name: torch.ones(2, 2).to_sparse(), **others}, TypeError, name, "torch.sparse_coo"),
    ]


def floats(name: str, *shape: int, **others: Any) -> list[Bad]:
    """What no tensor of real numbers may be."""
    dtypes = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    return [
        *tensors(name, **others),
        *(Bad(f"{name}-{d}", {name: torch.ones(shape).to(d), **others}, TypeError, name, str(d)) for d in dtypes),
    ]


def numbers(name: str, *outside: float) -> list[Bad]:
    """What no number may be, and the values outside its range."""
    kinds = ("1", True, 1j, torch.tensor(0.5))
    return [
        *(Bad(f"{name}-{type(x).__name__}", {name: x}, TypeError, name, describe(x)) for x in kinds),
        *(Bad(f"{name}={x}", {name: x}, ValueError, name, repr(x)) for x in (*outside, NAN, INF)),
        Bad(f"{name}-beyond-float", {name: 10**400}, ValueError, name, "1" + "0" * 400),
    ]


def integers(name: str) -> list[Bad]:
    """What no integer may be."""
    return [Bad(f"{name}-{x!r}", {name: x}, TypeError, name, repr(x)) for x in (1.0, "1", None, True)]


def elsewhere(name: str, value: torch.Tensor, **others: Any) -> Bad:
    return Bad(f"{name}-elsewhere", {name: value.detach().to("meta"), **others}, ValueError, name, "meta")


def shaped(name: str, *shape: int, **others: Any) -> Bad:
    dtype = torch.int64 if name == "targets" else torch.float32
    value = torch.zeros(shape, dtype=dtype)
    return Bad(f"{name}-{'x'.join(map(str, shape)) or 'scalar'}", {name: value, **others}, ValueError, name, str(shape))


def target(value: int) -> Bad:
    return Bad(f"target={value}", {"targets": torch.tensor([0, 1, value, 3])}, ValueError, "targets", str(value))


def order(id: str, value: Any, kind: type[Exception], shown: str) -> Bad:
    return Bad(f"vocab_order-{id}", {"vocab_order": value}, kind, "Spec.vocab_order", shown)


SOFT_WEIGHT = torch.ones(N, K)

# Each row is tried on every public function that has all of its arguments.
ARGUMENTS = [
    *floats("e", N, D),
    Bad("e-None", {"e": None}, TypeError, "e", "None"),
    shaped("e"),
    shaped("e", N, D + 1),
    shaped("e", N, 0),
    *floats("c", V, D),
    Bad("c-None", {"c": None}, TypeError, "c", "None"),
    shaped("c", D),
    shaped("c", 1, V, D),
    shaped("c", 0, D),
    elsewhere("c", C),
    *tensors("targets"),
    Bad("targets-None", {"targets": None}, TypeError, "targets", "None"),
    *(Bad(f"targets-{d}", {"targets": T.to(d)}, TypeError, "targets", str(d)) for d in (torch.float32, torch.bool)),
    shaped("targets", N + 1),
    shaped("targets", N, 1),
    shaped("targets"),
    elsewhere("targets", T),
    *floats("bias", V),
    shaped("bias", V + 1),
    shaped("bias", V, 1),
    shaped("bias"),
    elsewhere("bias", torch.ones(V)),
    *integers("ignore_index"),
    Bad("ignore_index-beyond-int64", {"ignore_index": 2**70}, ValueError, "ignore_index", str(2**70)),
    *integers("shift"),
    Bad("shift=-1", {"shift": -1}, ValueError, "shift", "-1"),
    Bad("shift-of-one-row", {"e": E[0], "targets": T[0], "shift": 1}, ValueError, "shift", "1"),
    *numbers("softcap", 0, -1.5),
    *numbers("logit_scale", 0, -1.5),
    Bad("logit_scale-None", {"logit_scale": None}, TypeError, "logit_scale", "None"),
    *numbers("label_smoothing", -0.1, 1.1),
    Bad("label_smoothing-None", {"label_smoothing": None}, TypeError, "label_smoothing", "None"),
    *numbers("z_loss", -1e-4),
    Bad("z_loss-None", {"z_loss": None}, TypeError, "z_loss", "None"),
    Bad("reduction-unknown", {"reduction": "average"}, ValueError, "reduction", "'average'"),
    Bad("reduction-None", {"reduction": None}, TypeError, "reduction", "None"),
    Bad("reduction-int", {"reduction": 1}, TypeError, "reduction", "1"),
    *floats("weight", V),
    shaped("weight", V + 1),
    shaped("weight", 1, V),
    elsewhere("weight", torch.ones(V)),
    Bad("weight-with-grad", {"weight": torch.ones(V, requires_grad=True)}, ValueError, "weight", "requires grad"),
    *tensors("token_weight"),
    Bad("token_weight-complex", {"token_weight": torch.ones(N) * 1j}, TypeError, "token_weight", "torch.complex64"),
    shaped("token_weight", N + 1),
    shaped("token_weight", N, 1),
    elsewhere("token_weight", torch.ones(N)),
    *floats("target_weight", N, K, targets=SOFT),
    shaped("target_weight", N, targets=SOFT),
    shaped("target_weight", N, K + 1, targets=SOFT),
    elsewhere("target_weight", SOFT_WEIGHT, targets=SOFT),
    shaped("targets", N, target_weight=torch.ones(N)),
    shaped("targets", N, 0, target_weight=torch.ones(N, 0)),
    shaped("targets", N + 1, K, target_weight=torch.ones(N + 1, K)),
    Bad("outputs-str", {"outputs": "nll"}, TypeError, "outputs", "'nll'"),
    Bad("outputs-None", {"outputs": None}, TypeError, "outputs", "None"),
    Bad("outputs-set", {"outputs": {"nll"}}, TypeError, "outputs", "{'nll'}"),
    Bad("outputs-empty", {"outputs": ()}, ValueError, "outputs", "()"),
    Bad("outputs-unknown", {"outputs": ("nll", "loss")}, ValueError, "outputs", "'loss'"),
    Bad("outputs-int", {"outputs": [0]}, ValueError, "outputs", "0"),
    Bad("backend-unknown", {"backend": "cuda"}, ValueError, "backend", "'cuda'"),
    Bad("backend-empty", {"backend": ""}, ValueError, "backend", "''"),
    *(Bad(f"backend-{x!r}", {"backend": x}, TypeError, "backend", repr(x)) for x in (None, 3, ["torch"])),
    *(Bad(f"spec-{x!r}", {"spec": x}, TypeError, "spec", repr(x)) for x in ("exact", {"filter": "none"}, cce.Spec)),
    Bad("spec-short-order", {"spec": cce.Spec(vocab_order=[1, 0])}, ValueError, "spec.vocab_order", "2"),
    *(
        Bad(f"vocab_parallel-{x!r}", {"vocab_parallel": x}, TypeError, "vocab_parallel", repr(x))
        for x in ("group", 2, True)
    ),
]

# Values of targets; explain and the constructors look at none.
TARGETS = [target(V), target(-1), target(-101), target(2**40), target(-(2**63))]

SPEC = [
    *(
        Bad(f"{name}-{x!r}", {name: x}, TypeError, f"Spec.{name}", repr(x))
        for name in ("block_n", "block_v", "scratch_bytes")
        for x in (128.0, "128", True)
    ),
    *(
        Bad(f"{name}={x}", {name: x}, ValueError, f"Spec.{name}", str(x))
        for name in ("block_n", "block_v", "scratch_bytes")
        for x in (0, -128)
    ),
    Bad("scratch_bytes-None", {"scratch_bytes": None}, TypeError, "Spec.scratch_bytes", "None"),
    *(
        Bad(f"{name}-{x!r}", {name: x}, ValueError, f"Spec.{name}", repr(x))
        for name in ("lse_accumulation", "filter", "accumulate", "row_order")
        for x in ("fast", 3, ["none"])
    ),
    *(
        Bad(f"{name}-None", {name: None}, ValueError, f"Spec.{name}", "None")
        for name in ("lse_accumulation", "row_order")
    ),
    Bad("filter-array", {"filter": np.array(["none", "tile"])}, ValueError, "Spec.filter", "array"),
    Bad("accumulate-dtype", {"accumulate": torch.float32}, ValueError, "Spec.accumulate", "torch.float32"),
    *(Bad(f"threshold={x}", {"threshold": x}, ValueError, "Spec.threshold", repr(x)) for x in (0, 1, -0.1, 2.0, NAN)),
    *(
        Bad(f"threshold-{x!r}", {"threshold": x}, TypeError, "Spec.threshold", describe(x))
        for x in ("0.1", True, torch.tensor(0.5))
    ),
    *(Bad(f"compensate-{x!r}", {"compensate": x}, TypeError, "Spec.compensate", repr(x)) for x in (1, None, "yes")),
    order("twice", [0, 1, 1], ValueError, "3 values"),
    order("from-1", [1, 2, 3], ValueError, "3 values"),
    order("negative", [-1, 0, 1], ValueError, "3 values"),
    order("float", [0.0, 1.0], TypeError, "torch.float32"),
    order("bool", [False, True], TypeError, "torch.bool"),
    order("complex64", torch.zeros(1, dtype=torch.complex64), TypeError, "torch.complex64"),
    order("complex128", torch.zeros(1, dtype=torch.complex128), TypeError, "torch.complex128"),
    order("2-D", [[0, 1]], TypeError, "(1, 2)"),
    order("scalar", 3, TypeError, "()"),
    order("unknown", "abc", ValueError, "'abc'"),
    order("set", {0, 1}, TypeError, "set"),
    order("ragged", [[0], [1, 2]], TypeError, "list"),
    order("sparse", torch.arange(3).to_sparse(), TypeError, "torch.sparse_coo"),
    order("meta", torch.arange(3, device="meta"), ValueError, "meta"),
]

HEAD = [
    *(
        Bad(f"{name}-{x!r}", {name: x}, TypeError, name, repr(x))
        for name in ("in_features", "out_features")
        for x in (3.0, "3", None, True)
    ),
    *(
        Bad(f"{name}={x}", {name: x}, ValueError, name, str(x))
        for name in ("in_features", "out_features")
        for x in (0, -3)
    ),
    Bad("unknown-option", {"smoothing": 0.1}, TypeError, "smoothing", "0.1"),
    *(Bad(f"{x}-is-no-option", {x: 0.1}, TypeError, x, "0.1") for x in ("token_weight", "target_weight")),
    *(Bad(f"dtype-{x}", {"dtype": x}, TypeError, "dtype", str(x)) for x in (torch.int64, torch.complex64, torch.bool)),
]

REGISTER = [
    *(Bad(f"name-{x!r}", {"name": x}, TypeError, "name", repr(x)) for x in (None, 3, ["mine"])),
    *(Bad(f"name-{x!r}", {"name": x}, ValueError, "name", repr(x)) for x in ("", "auto", "torch", "reference")),
    *(Bad(f"factory-{x!r}", {"factory": x}, TypeError, "factory", repr(x)) for x in (None, "module:Backend")),
]

UNREGISTER = [
    *(Bad(f"name-{x!r}", {"name": x}, ValueError, "name", repr(x)) for x in ("torch", "nobody", "")),
    Bad("name-3", {"name": 3}, TypeError, "name", "3"),
    Bad("name-list", {"name": ["mine"]}, TypeError, "name", "['mine']"),
]

EXPLAIN = [Bad("unknown-option", {"smoothing": 0.1}, TypeError, "smoothing", "0.1")]


def head(e: Any = E, targets: Any = T, **arguments: Any) -> Any:
    """``LinearCrossEntropy``: its options given to the constructor, the rest to the call."""
    call = {name: arguments.pop(name) for name in ("token_weight", "target_weight") if name in arguments}
    return cce.LinearCrossEntropy(D, V, **arguments)(e, targets, **call)


def _parameters(function: Callable[..., Any]) -> set[str]:
    names = set(inspect.signature(cce.loss if function in (cce.explain, head) else function).parameters)
    return names - {"c", "bias"} if function is head else names


FUNCTIONS = {"terms": cce.terms, "loss": cce.loss, "head": head, "explain": cce.explain, "live": cce.live_fraction}
BASE: dict[Any, dict[str, Any]] = {
    **{function: {"e": E, "c": C, "targets": T} for function in FUNCTIONS.values()},
    head: {},
    cce.Spec: {},
    cce.LinearCrossEntropy: {"in_features": D, "out_features": V},
    cce.register_backend: {"name": "mine", "factory": TorchBackend},
    cce.unregister_backend: {},
}
TABLES: list[tuple[str, Callable[..., Any], list[Bad]]] = [
    *(
        (name, function, [b for b in ARGUMENTS if b.arguments.keys() <= _parameters(function)])
        for name, function in FUNCTIONS.items()
    ),
    *((name, function, TARGETS) for name, function in FUNCTIONS.items() if function is not cce.explain),
    ("Spec", cce.Spec, SPEC),
    ("LinearCrossEntropy", cce.LinearCrossEntropy, HEAD),
    ("explain", cce.explain, EXPLAIN),
    ("register", cce.register_backend, REGISTER),
    ("unregister", cce.unregister_backend, UNREGISTER),
]
CALLS = [pytest.param(function, bad, id=f"{name}-{bad.id}") for name, function, table in TABLES for bad in table]


@pytest.fixture(autouse=True)
def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every backend there is only notes that it was called."""
    calls: list[str] = []

    def watch(backend: type, method: str) -> None:
        def called(*args: Any) -> None:
            calls.append(f"{backend.__name__}.{method}")
            raise AssertionError(f"computed: {calls[-1]}")

        monkeypatch.setattr(backend, method, called)

    for backend in (TorchBackend, ReferenceBackend):
        watch(backend, "forward")
        watch(backend, "backward")
    watch(TorchBackend, "loss_and_gradients")
    monkeypatch.setattr(registry, "_registered", {})
    return calls


@pytest.mark.parametrize(("function", "bad"), CALLS)
def test_is_refused(function: Callable[..., Any], bad: Bad, spy: list[str]) -> None:
    with pytest.raises(bad.kind) as caught:
        function(**{**BASE[function], **bad.arguments})
    message = str(caught.value)
    assert message.startswith(f"{bad.name}:"), f"does not begin with the argument's name: {message}"
    assert bad.value in message, f"does not name the value {bad.value}: {message}"
    assert not spy, "something was computed first"


def test_sixty_kinds() -> None:
    """Distinct pairs of argument and kind of value, whatever function they are tried on."""
    kinds = {(bad.name, bad.id) for _, _, table in TABLES for bad in table}
    assert len(kinds) >= 60


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("function", [cce.terms, cce.loss, head])
def test_the_spy_sees_good_input(function: Callable[..., Any], backend: str, spy: list[str]) -> None:
    with pytest.raises(AssertionError, match="computed"):
        function(**BASE[function], backend=backend)
    assert spy


def test_good_input_is_explained(spy: list[str]) -> None:
    assert cce.explain(E, C, T).backend == "torch"
    assert not spy
