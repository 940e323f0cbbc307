"""A stand-in for a model's logits: a tensor without elements that knows of which product they would be.

Between its head and its loss a model scales its logits, caps them, casts them and changes their shape. Each of these
operations reaches ``Logits.__torch_function__``, where a rule turns it into another stand-in: nothing is computed
before ``cross_entropy``, which becomes ``cce.loss`` of the same hidden states, classifier, scale and softcap. An
operation without a rule needs the elements; it raises an error that names the model and the operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cce.functional import loss

SUPPORTED = (
    "products and quotients with numbers, tanh, casts, an added bias, contiguous, changes of shape that leave the "
    "vocabulary last, slices, and torch.nn.functional.cross_entropy"
)


@dataclass
class Call:
    """One forward of a patched model.

    Attributes:
        owner: the model's class name, for messages.
        options: of ``cce.loss``, as given to ``patch``.
        losses: how many losses were computed from stand-ins.
    """

    owner: str
    options: dict[str, Any] = field(default_factory=dict)
    losses: int = 0


@dataclass(frozen=True)
class Product:
    """``z = scale * (e c^T + bias)``, or ``cap * tanh`` of it.

    Attributes:
        e: (..., D).
        c: (V, D).
        bias: (V,) or None.
        scale: what the product was multiplied with, before tanh.
        cap: what tanh was multiplied with; None without tanh.
    """

    e: Tensor
    c: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def times(self, factor: float) -> Product:
        if self.cap is None:
            return replace(self, scale=self.scale * factor)
        return replace(self, cap=self.cap * factor)

    def with_rows(self, e: Tensor) -> Product:
        return replace(self, e=e)


class Logits(Tensor):
    """A tensor with the shape, dtype and device of the logits, and a :class:`Product` instead of elements."""

    product: Product
    call: Call

    @staticmethod
    def __new__(cls, product: Product, dtype: torch.dtype, call: Call) -> Logits:
        shape = (*product.e.shape[:-1], product.c.shape[0])
        # requires_grad stays False: the graph runs through e and c, not through the stand-in.
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=product.e.device)
        self.product, self.call = product, call
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Logits(shape={tuple(self.shape)}, dtype={self.dtype}, not computed)"

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = RULES[name](*args, **kwargs) if name in RULES else NotImplemented
        if found is NotImplemented:
            raise TypeError(_refusal(name, args, kwargs))
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(_refusal(str(func), args, kwargs or {}))

    def like(self, product: Product, dtype: torch.dtype | None = None) -> Logits:
        return Logits(product, dtype or self.dtype, self.call)


def _refusal(name: str, args: Any, kwargs: Any) -> str:
    found = [x for x in (*args, *kwargs.values()) if isinstance(x, Logits)]
    owner = found[0].call.owner if found else "the model"
    given = ", ".join([*map(_brief, args), *(f"{key}={_brief(x)}" for key, x in kwargs.items())])
    return (
        f"model: {owner} calls {name}({given}) on its logits, which a patched model does not compute in training, "
        f"expected only {SUPPORTED}; cce.integrations.transformers.unpatch it to train it with its own loss"
    )


def _brief(x: Any) -> str:
    if isinstance(x, Logits):
        return f"logits {tuple(x.shape)}"
    return f"tensor {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


#: Answered by the empty tensor itself.
METADATA = frozenset(
    [
        *("shape", "dtype", "device", "layout", "ndim", "size", "dim", "numel", "nelement", "__len__", "get_device"),
        *("requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_meta", "is_sparse", "is_nested", "is_contiguous"),
        *("is_floating_point", "is_complex"),
    ]
)


def _scaled(x: Any, factor: Any) -> Any:
    """By a number, or by a tensor of one element (a learned scale), which multiplies the rows of ``e``."""
    if isinstance(factor, Real):
        return x.like(x.product.times(float(factor)))
    if not isinstance(factor, Tensor) or isinstance(factor, Logits) or factor.numel() != 1 or factor.ndim > x.ndim:
        return NotImplemented
    product, factor = x.product, factor.reshape(())
    if product.cap is not None:
        return NotImplemented
    bias = None if product.bias is None else product.bias * factor
    return x.like(replace(product, e=product.e * factor, bias=bias))


def _mul(x: Any, other: Any) -> Any:
    return _scaled(x, other) if isinstance(x, Logits) else _scaled(other, x)


def _div(x: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if not isinstance(x, Logits) or rounding_mode is not None or isinstance(other, Logits):
        return NotImplemented
    if isinstance(other, Real) and other == 0:
        raise ValueError(f"model: {x.call.owner} divides its logits by {other!r}, expected a number other than 0")
    return _scaled(x, 1 / other)


def _neg(x: Logits) -> Logits:
    return x.like(x.product.times(-1.0))


def _tanh(x: Logits) -> Any:
    return NotImplemented if x.product.cap is not None else x.like(replace(x.product, cap=1.0))


def _add(x: Any, other: Any, *, alpha: float = 1) -> Any:
    """A second product, as a LoRA head has, or a bias."""
    if not isinstance(x, Logits):
        x, other = other, x
    if x.product.cap is not None or alpha != 1:
        return NotImplemented
    if isinstance(other, Logits):
        return _sum(x, other)
    v = x.shape[-1]
    if not isinstance(other, Tensor) or not 1 <= other.ndim <= x.ndim or other.shape[-1] != v or other.numel() != v:
        return NotImplemented
    bias = other.reshape(-1) / x.product.scale
    before = x.product.bias
    return x.like(replace(x.product, bias=bias if before is None else before + bias))


def _sum(x: Logits, other: Logits) -> Any:
    """``x w^T + h b^T`` is one product, ``[x, h] [w, b]^T``: exact, also if ``h`` went through dropout.

    It is made in the dtype of the wider part, which for LoRA is the frozen weight: a float32 adapter must not
    make a float32 copy of a bf16 vocabulary.
    """
    if x.shape != other.shape or other.product.cap is not None:
        return NotImplemented
    parts = [x.product, other.product]
    dtype = max(parts, key=lambda part: part.c.shape[1]).c.dtype
    e = torch.cat([(part.e if part.scale == 1 else part.e * part.scale).to(dtype) for part in parts], dim=-1)
    c = torch.cat([part.c.to(dtype) for part in parts], dim=1)
    biases = [part.bias * part.scale for part in parts if part.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    return x.like(Product(e, c, bias), torch.promote_types(x.dtype, other.dtype))


def _cast_to(dtype: torch.dtype) -> Callable[[Logits], Logits]:
    """The product keeps its dtypes: ``cce.loss`` sums in float32 anyway. Only the loss will be of this dtype."""
    return lambda x: x.like(x.product, dtype)


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    """Of the forms of ``Tensor.to`` those that leave the device."""
    dtype, device = x.dtype, x.device
    wanted = {**{("dtype" if isinstance(arg, torch.dtype) else "device"): arg for arg in args[:2]}, **kwargs}
    for key in ("non_blocking", "copy", "memory_format"):
        wanted.pop(key, None)
    if isinstance(wanted.get("device"), Tensor):
        other = wanted.pop("device")
        dtype, device = other.dtype, other.device
    dtype = wanted.pop("dtype", None) or dtype
    device = torch.device(wanted.pop("device", None) or device)
    same = device.type == x.device.type and device.index in (None, x.device.index)
    return x.like(x.product, dtype) if same and not wanted and dtype.is_floating_point else NotImplemented


def _type(x: Logits, dtype: Any = None, **_: Any) -> Any:
    return _to(x, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


def _same(x: Logits, **_: Any) -> Logits:
    return x


def _reshape(x: Logits, *shape: Any) -> Any:
    """Only if the vocabulary stays the last dimension: then it is a reshape of the rows of ``e``."""
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    v, d = x.shape[-1], x.product.e.shape[-1]
    if not sizes or isinstance(sizes[0], torch.dtype):
        return NotImplemented
    if sizes[-1] != v:
        raise ValueError(
            f"vocab_size: {x.call.owner} gives its logits of shape {tuple(x.shape)} the shape {sizes}, expected the "
            f"head's {v} entries last; is config.vocab_size that of the head?"
        )
    return x.like(x.product.with_rows(x.product.e.reshape(*sizes[:-1], d)))


def _flatten(x: Logits, start_dim: int = 0, end_dim: int = -1) -> Any:
    end_dim %= x.ndim
    if end_dim == x.ndim - 1:
        return NotImplemented
    return x.like(x.product.with_rows(x.product.e.flatten(start_dim, end_dim)))


def _getitem(x: Logits, index: Any) -> Any:
    """Slices; that of the last dimension leaves out entries of the vocabulary."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(part, slice) and part is not Ellipsis for part in parts) or parts.count(Ellipsis) > 1:
        return NotImplemented
    missing = [slice(None)] * (x.ndim - len(parts) + parts.count(Ellipsis))
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts[at : at + 1] = missing
    *rows, entries = parts
    product = x.product
    bias = None if product.bias is None else product.bias[entries]
    return x.like(replace(product, e=product.e[tuple(rows)] if rows else product.e, c=product.c[entries], bias=bias))


def _cross_entropy(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``cce.loss`` of what ``x`` stands for, with the options of the patch."""
    old_style = size_average is not None or reduce is not None
    if not isinstance(x, Logits) or x.ndim != 2 or old_style or target.is_floating_point():
        return NotImplemented
    _check_present(x)
    of_model: dict[str, Any] = {}
    if weight is not None:
        of_model["weight"] = weight
    if label_smoothing:
        of_model["label_smoothing"] = label_smoothing
    options = dict(x.call.options)
    for name in of_model.keys() & options.keys():
        raise ValueError(f"{name}: got {options[name]!r} in patch, but {x.call.owner} has one: {of_model[name]!r}")
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(x.device)
    product = x.product
    cap = product.cap
    x.call.losses += 1
    value = loss(
        product.e,
        product.c,
        target,
        product.bias,
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=cap,
        logit_scale=product.scale if cap is None else product.scale * cap,
        **of_model,
        **options,
    )
    return value.to(x.dtype)  # as F.cross_entropy's


def _check_present(x: Logits) -> None:
    """A sharding library may have taken the gathered weight back when the head's call was over."""
    c = x.product.c
    if c.numel() != x.shape[-1] * x.product.e.shape[-1] or (c.untyped_storage().nbytes() == 0 and c.numel()):
        raise ValueError(
            f"model: the head's weight of {x.call.owner} was released after the head's forward, expected one that is "
            "there until the loss; do not shard the head as a unit of its own (FSDP: leave it in the root's unit)"
        )


RULES: dict[str, Callable[..., Any]] = {
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "neg": _neg,
    "tanh": _tanh,
    "add": _add,
    "to": _to,
    "type": _type,
    "float": _cast_to(torch.float32),
    "bfloat16": _cast_to(torch.bfloat16),
    "half": _cast_to(torch.float16),
    "double": _cast_to(torch.float64),
    "contiguous": _same,
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _flatten,
    "__getitem__": _getitem,
    "cross_entropy": _cross_entropy,
}
