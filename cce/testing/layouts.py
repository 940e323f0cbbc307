"""Every tensor of a call in every layout PyTorch has, with NaN around its values: a layout changes no number.

Around integers stand values that are no target and no place of an order. So whoever takes a pointer without its
strides, or reads beyond the values, shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import cce
from cce import registry
from cce.backends.resolve import resolve
from cce.frontend.checks import OUTPUTS
from cce.testing.check_option import differentiate, make_upstream, near, run_option, widened
from cce.testing.definition import dense
from cce.testing.options import FILTERED, Option, V, make_data

#: Neither a target nor a place; no overflow where 32 bits hold it.
_NO_ENTRY = 2**30


def _filled(like: Tensor, *shape: int) -> Tensor:
    """A tensor of what must not be read."""
    return like.new_full(shape, torch.nan if like.is_floating_point() else _NO_ENTRY)


def every_other(x: Tensor) -> Tensor:
    """x[..., ::2] of a tensor twice as large."""
    room = _filled(x, *x.shape[:-1], 2 * x.shape[-1])
    room[..., ::2] = x
    return room[..., ::2]


def every_third_row(x: Tensor) -> Tensor:
    """x[1::3]: the first dimension has the stride."""
    room = _filled(x, 3 * x.shape[0] + 1, *x.shape[1:])
    room[1::3] = x
    return room[1::3]


def unaligned(x: Tensor) -> Tensor:
    """Contiguous, but one element behind the beginning of the memory."""
    room = _filled(x, x.numel() + 8)
    return room[1 : 1 + x.numel()].copy_(x.reshape(-1)).view(x.shape)


def column(x: Tensor) -> Tensor:
    """One of the columns of a larger tensor: no dimension has stride 1."""
    room = _filled(x, *x.shape, 5)
    room[..., 3] = x
    return room[..., 3]


def transposed(x: Tensor) -> Tensor:
    """The last two dimensions change places in memory; of a vector, which has one, it is ``every_other``."""
    if x.ndim < 2:
        return every_other(x)
    room = _filled(x, *x.shape[:-2], x.shape[-1] + 1, x.shape[-2] + 3)
    room[..., :-1, 1:-2] = x.mT
    return room[..., :-1, 1:-2].mT


def inside(x: Tensor) -> Tensor:
    """A part of a larger tensor in every dimension."""
    room = _filled(x, *(size + 5 for size in x.shape))
    part = tuple(slice(2, 2 + size) for size in x.shape)
    room[part] = x
    return room[part]


def flipped(x: Tensor) -> Tensor:
    """A flipped copy of a transposed tensor: PyTorch keeps its strides."""
    return transposed(x.flip(-1)).flip(-1)


def same_rows(x: Tensor) -> Tensor:
    """Stride 0 along the first dimension: of a vector, one number."""
    return inside(x[:1]).expand(x.shape)


def same_columns(x: Tensor) -> Tensor:
    """Stride 0 along the last dimension."""
    return inside(x[..., :1]).expand(x.shape)


Layout = Callable[[Tensor], Tensor]
STRIDED: tuple[Layout, ...] = (every_other, every_third_row, unaligned, column, transposed, inside, flipped)
#: These change what the values are, so that each tensor is tried alone.
EXPANDED: tuple[Layout, ...] = (same_rows, same_columns)

_SUMMED = {"e", "c", "weight"}
_ORDER = "vocab_order"
_UPSTREAM = "upstream"

#: Calls that between them have every tensor, in one pass and in two, filtered and not.
CALLS = {
    "mean": Option("mean", tensors=("bias",)),
    "weighted sum": Option(
        "weighted sum",
        {"reduction": "sum"},
        ("token_weight", "target_weight"),
        frozen=("token_weight", "target_weight"),
    ),
    "none": Option(
        "none",
        {"reduction": "none", "label_smoothing": 0.2, "shift": 1},
        ("bias", "weight", "token_weight", "target_weight"),
    ),
    "terms": Option("terms", {"softcap": 3.0}, ("bias", "target_weight"), OUTPUTS),
    "bfloat16": Option(
        "bfloat16", {"reduction": "none"}, ("bias",), e_dtype=torch.bfloat16, c_dtype=torch.bfloat16, tolerance=5e-3
    ),
    "filtered": Option(
        "filtered", {"reduction": "none"}, ("bias",), spec={**FILTERED, _ORDER: range(V)[::-1]}, tolerance=2e-2
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """A call with some of its tensors in a layout.

    Args:
        call: a key of ``CALLS``.
        layout: one of ``STRIDED`` or ``EXPANDED``.
        names: the tensors that are in it: those of the call, "vocab_order" and "upstream"; none stands for all.
    """

    call: str
    layout: Layout
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.call}, {', '.join(self.names) or 'all'} {self.layout.__name__}"

    @property
    def short(self) -> bool:
        """It is one of those for an interpreter, which takes seconds for each."""
        expanded = ("mean", ("bias",)), ("none", ("targets",)), ("terms", (_UPSTREAM,)), ("filtered", ("c",))
        return self.layout is column or (self.layout is same_rows and (self.call, self.names) in expanded)


def _placed() -> list[Placed]:
    found = [Placed(call, layout) for call in CALLS for layout in STRIDED]
    for call, option in CALLS.items():
        names = ("e", "c", "targets", *option.tensors, *([_UPSTREAM] if call != "mean" else []))
        for name in names:
            # The last dimension of a vector is its first.
            both = name in ("e", "c") or (name in ("targets", "token_weight", _UPSTREAM) and call != "terms")
            found += [Placed(call, layout, (name,)) for layout in (EXPANDED if both else EXPANDED[:1])]
    return found


LAYOUTS: tuple[Placed, ...] = tuple(_placed())


def check_layout(placed: Placed, backend: str, device: str) -> list[str]:
    """The call as placed, against the definition, and against the bits of the same call on contiguous tensors.

    Products and means of another layout may add in another order, so ``_SUMMED`` are free of the second.

    Returns:
        The backend's reasons, if it refuses the call.

    Raises:
        AssertionError: a wrong number; the message says in which of the tensors the fault is.
    """
    option = CALLS[placed.call]
    problem = option.problem(device)
    reasons = registry.reasons(backend, problem, resolve(option.make_spec(), problem))
    if reasons:
        return reasons
    message = _failure(placed, placed.names, backend, device)
    if message and not placed.names:
        alone = [name for name in _names(option) if _failure(placed, (name,), backend, device)]
        message += f" (alone: {', '.join(alone) or 'none'})"
    assert not message, message
    return []


def _names(option: Option) -> list[str]:
    return ["e", "c", "targets", *option.tensors, *([_ORDER] if _ORDER in option.spec else []), _UPSTREAM]


def _failure(placed: Placed, names: tuple[str, ...], backend: str, device: str) -> str:
    """Failure of the call whose tensors ``names`` (default: all) are in the layout, or ""."""
    option, chosen = CALLS[placed.call], names or tuple(_names(CALLS[placed.call]))
    data = make_data(option, device)
    layouts = {name: placed.layout if name in chosen else torch.clone for name in _names(option)}
    data = {name: layouts[name](x.detach()).requires_grad_(x.requires_grad) for name, x in data.items()}
    plain = {name: _contiguous(x).requires_grad_(x.requires_grad) for name, x in data.items()}
    specs = [_spec(option, layouts.get(_ORDER, torch.clone), device), _spec(option, torch.clone, device)]
    try:
        outputs = run_option(option, data, backend, specs[0])
        upstream = {name: layouts[_UPSTREAM](x) if x.ndim else x for name, x in make_upstream(outputs).items()}
        found = {**outputs, **differentiate(outputs, data, upstream)}
        wide = widened(option, plain)
        expected = dense(option.call, wide, option.outputs)
        expected |= differentiate(expected, wide, upstream)
        # Of equal rows of c, dE is 0: its error is relative to what cancels.
        size = float(plain["c"].detach().double().norm(dim=1).amax()) * _norm(upstream) if "c" in names else 0.0
        for name, x in expected.items():
            near(name, found[name], x, option.tolerance, size if name == "e" else 0.0)
        if not _SUMMED & set(chosen):
            same = run_option(option, plain, backend, specs[1])
            same |= differentiate(same, plain, {name: _contiguous(x) for name, x in upstream.items()})
            differ = [name for name, x in same.items() if not torch.equal(x, found[name])]
            assert not differ, f"other bits than with contiguous tensors: {', '.join(differ)}"
    except (AssertionError, ValueError, IndexError) as error:  # a target read from elsewhere is outside [0, V)
        return str(error) or "failed"
    return ""


def _norm(upstream: dict[str, Tensor]) -> float:
    return float(torch.cat([x.double().reshape(-1) for x in upstream.values()]).norm())


def _contiguous(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _spec(option: Option, layout: Layout, device: str) -> cce.Spec:
    if _ORDER not in option.spec:
        return option.make_spec()
    return cce.Spec(**{**option.spec, _ORDER: layout(torch.tensor(option.spec[_ORDER], device=device))})
