"""A stand-in for a model's logits: a tensor without elements that knows the product they would be.

Between head and loss, a model scales its logits, caps them, casts them and changes their shape. Each of these
operations reaches ``Logits.__torch_function__``, where a rule turns it into another stand-in: nothing is computed
before ``cross_entropy``, which becomes ``cce.loss`` of the same hidden states, classifier, scale and softcap. An
operation without a rule would need the elements; it raises an error that names the model and the operation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cce.integrations.transformers.product import Product

SUPPORTED = (
    "products and quotients with numbers, tanh, casts, an added bias, contiguous, changes of shape that leave the "
    "vocabulary last, slices, and torch.nn.functional.cross_entropy"
)


@dataclass
class Call:
    """One forward of a patched model.

    Attributes:
        owner: class name of the model, for messages.
        options: options of ``cce.loss``, as given to ``patch``.
        losses: number of losses computed from stand-ins.
    """

    owner: str
    options: dict[str, Any] = field(default_factory=dict)
    losses: int = 0


class Logits(Tensor):
    """A tensor with the shape, dtype and device of the logits, and a :class:`Product` instead of elements."""

    product: Product
    call: Call

    @staticmethod
    def __new__(cls, product: Product, dtype: torch.dtype, call: Call) -> Logits:
        # requires_grad stays False: the graph runs through e and c, not through the stand-in.
        self = torch.Tensor._make_wrapper_subclass(cls, product.shape, dtype=dtype, device=product.e.device)
        self.product, self.call = product, call
        return self

    def __repr__(self) -> str:  # type: ignore[override]  # there are no contents to be told
        return f"Logits(shape={tuple(self.shape)}, dtype={self.dtype}, not computed)"

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch says no type of it
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = RULES[name](*args, **kwargs) if name in RULES else NotImplemented
        if found is NotImplemented:
            # Not a TypeError, which Python's operators would replace by their own.
            raise ValueError(_refusal(name, args, kwargs))
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise ValueError(_refusal(str(func), args, kwargs or {}))

    def like(self, product: Product, dtype: torch.dtype | None = None) -> Logits:
        """Stand-in for another product in the same call."""
        return Logits(product, dtype or self.dtype, self.call)


def _refusal(name: str, args: Any, kwargs: Any) -> str:
    values = [*args, *kwargs.values()]
    values += [x for group in values if isinstance(group, (list, tuple)) for x in group]
    owner = next((x.call.owner for x in values if isinstance(x, Logits)), "the model")
    given = ", ".join([*map(_brief, args), *(f"{key}={_brief(x)}" for key, x in kwargs.items())])
    return (
        f"model: {owner} calls {name}({given}) on its logits, which a patched model does not compute in training, "
        f"expected only {SUPPORTED}; cce.integrations.transformers.unpatch it to train it with its own loss"
    )


def _brief(x: Any) -> str:
    if isinstance(x, Logits):
        return f"logits {tuple(x.shape)}"
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_brief, x))}]"
    return f"tensor {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


#: Functions answered by the empty tensor itself.
METADATA = frozenset(
    [
        *("shape", "dtype", "device", "layout", "ndim", "size", "dim", "numel", "nelement", "__len__", "get_device"),
        *("requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_meta", "is_sparse", "is_nested", "is_contiguous"),
        *("is_floating_point", "is_complex"),
    ]
)


def _mul(x: Any, factor: Any) -> Any:
    """Multiply by a number, or by a tensor with one element: a learned scale."""
    if not isinstance(x, Logits):
        x, factor = factor, x
    if isinstance(factor, Real):
        return x.like(x.product.times(float(factor)))
    one = isinstance(factor, Tensor) and not isinstance(factor, Logits) and factor.numel() == 1
    if not one or factor.ndim > x.ndim or x.product.cap is not None:
        return NotImplemented
    return x.like(x.product.times_tensor(factor.reshape(())))


def _div(x: Any, divisor: Any, *, rounding_mode: str | None = None) -> Any:
    if not isinstance(x, Logits) or isinstance(divisor, Logits) or rounding_mode is not None:
        return NotImplemented
    if isinstance(divisor, Real) and divisor == 0:
        raise ValueError(f"model: {x.call.owner} divides its logits by {divisor!r}, expected a number other than 0")
    return _mul(x, 1 / divisor)


def _tanh(x: Logits) -> Any:
    return NotImplemented if x.product.cap is not None else x.like(replace(x.product, cap=1.0))


def _add(x: Any, other: Any, *, alpha: float = 1) -> Any:
    """Add a second product, as LoRA heads do, or a bias."""
    if not isinstance(x, Logits):
        x, other = other, x
    if x.product.cap is not None or alpha != 1 or not isinstance(other, Tensor):
        return NotImplemented
    if isinstance(other, Logits):
        if x.shape != other.shape or other.product.cap is not None:
            return NotImplemented
        return x.like(x.product.plus(other.product), torch.promote_types(x.dtype, other.dtype))
    v = x.shape[-1]
    if not 1 <= other.ndim <= x.ndim or other.shape[-1] != v or other.numel() != v:
        return NotImplemented
    return x.like(x.product.plus_bias(other.reshape(-1)))


def _cast_to(dtype: torch.dtype) -> Callable[[Logits], Logits]:
    """Make a cast of the loss alone: the product keeps its dtypes, as ``cce.loss`` sums in float32 anyway."""
    return lambda x: x.like(x.product, dtype)


def _to(x: Logits, *args: Any, **kwargs: Any) -> Any:
    """Apply ``Tensor.to`` in the forms that keep the device."""
    wanted = {**{("dtype" if isinstance(arg, torch.dtype) else "device"): arg for arg in args[:2]}, **kwargs}
    for key in ("non_blocking", "copy", "memory_format"):
        wanted.pop(key, None)
    place = wanted.pop("device", None)
    if isinstance(place, Tensor):
        return _to(x, place.device, place.dtype)
    device = x.device if place is None else torch.device(place)
    dtype = wanted.pop("dtype", None) or x.dtype
    same = device.type == x.device.type and device.index in (None, x.device.index)
    return x.like(x.product, dtype) if same and not wanted and dtype.is_floating_point else NotImplemented


def _type(x: Logits, dtype: Any = None, **_: Any) -> Any:
    return _to(x, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


def _same(x: Logits, **_: Any) -> Logits:
    return x


def _reshape(x: Logits, *shape: Any) -> Any:
    """Reshape the rows of ``e``; possible only if the vocabulary stays the last dimension."""
    sizes = tuple(shape[0]) if shape and isinstance(shape[0], (tuple, list)) else shape
    if not sizes or not all(isinstance(size, (int, torch.SymInt)) for size in sizes):
        return NotImplemented
    v, e = x.shape[-1], x.product.e
    if sizes[-1] != v:
        raise ValueError(
            f"vocab_size: {x.call.owner} gives its logits of shape {tuple(x.shape)} the shape {sizes}, expected the "
            f"head's {v} entries last; is config.vocab_size that of the head?"
        )
    return x.like(replace(x.product, e=e.reshape(*sizes[:-1], e.shape[-1])))


def _flatten(x: Logits, start_dim: int = 0, end_dim: int = -1) -> Any:
    end_dim %= x.ndim
    if end_dim == x.ndim - 1:
        return NotImplemented
    return x.like(replace(x.product, e=x.product.e.flatten(start_dim, end_dim)))


def _getitem(x: Logits, index: Any) -> Any:
    """Take slices; one in the last dimension leaves out entries of the vocabulary."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(part, slice) or part is Ellipsis for part in parts) or parts.count(Ellipsis) > 1:
        return NotImplemented
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts[at : at + 1] = [slice(None)] * (x.ndim - len(parts) + parts.count(Ellipsis))
    product = x.product.entries(parts[-1])
    return x.like(replace(product, e=product.e[tuple(parts[:-1])]))


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
    """Compute ``cce.loss`` of the product ``x`` stands for, with the options of the patch."""
    old_style = size_average is not None or reduce is not None
    if not isinstance(x, Logits) or x.ndim != 2 or old_style or target.is_floating_point():
        return NotImplemented
    _check_present(x)
    options, of_model = dict(x.call.options), {"weight": weight, "label_smoothing": label_smoothing or None}
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(x.device)
    for name, value in of_model.items():
        if value is not None and name in options:
            raise ValueError(f"{name}: got one in patch, expected none, as {x.call.owner} has one of its own")
        if value is not None:
            options[name] = value
    x.call.losses += 1
    device = x.device.type
    # Not every device has it: meta does not.
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    # Operands to be cast were cast when the head was called.
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        found = x.product.loss(target, ignore_index=ignore_index, reduction=reduction, **options)
    # Like the result of F.cross_entropy, which autocast computes in float32.
    return found.to(torch.promote_types(x.dtype, torch.float32) if autocast else x.dtype)


def _check_present(x: Logits) -> None:
    """Check that a sharding library has not released the gathered weight after the head's call."""
    c = x.product.c
    if c.shape[0] != x.shape[-1] or (c.numel() and not c.untyped_storage().nbytes()):
        raise ValueError(
            f"model: the head's weight of {x.call.owner} was released after the head's forward, expected one that is "
            "there until the loss; leave the head to the root's unit of FSDP, or shard it with "
            "reshard_after_forward=False"
        )


RULES: dict[str, Callable[..., Any]] = {
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
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
