"""All private parts of torch that this package uses, so that a new torch can break only one file.

Operators are made as by ``torch.library.custom_op``, but without importing ``torch._dynamo`` at their first call.
Importing dynamo takes seconds and is needed only to exclude the function from tracing; we do that when dynamo is first
loaded. Whether a result is one of the arguments is checked by tests (``torch.library.opcheck``), not in each call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

# Private, and used by custom_op: a module that is imported again, as in notebooks, defines its operators anew.
from torch._library.custom_ops import get_library_allowing_overwrite

#: Handle of the current stream of a CUDA device; only builds of torch for CUDA have it.
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # type: ignore[assignment]
#: Index of the current CUDA device, without the checks of ``torch.cuda.current_device``.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", None)  # type: ignore[assignment]

#: Whether a transform of torch.func is active, as ``torch.autograd.Function`` asks.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
#: Number of the modes of ``torch.utils._python_dispatch`` that see every operator.
dispatch_depth: Callable[[], int] = torch._C._len_torch_dispatch_stack
#: The module that knows the levels of forward-mode differentiation.
forward_ad: Any = torch.autograd.forward_ad

_libraries: dict[str, torch.library.Library] = {}


def operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorator that turns a function which changes no argument into the operator ``name`` on any device."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        namespace, short = name.split("::")
        library = _libraries[name] = get_library_allowing_overwrite(namespace, short)
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, lib=library, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", _unseen(function), lib=library)
        return getattr(getattr(torch.ops, namespace), short).default

    return make


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorator of the function that gives the results of the operator ``name`` without their values."""
    return torch.library.register_fake(name, lib=_libraries[name])


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give the operator ``name`` gradients; both functions are as for ``torch.library.register_autograd``."""
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_libraries[name])


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hide a function from torch.compile."""
    disabled: Callable[..., Any] | None = None

    @wraps(function)
    def run(*arguments: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*arguments)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*arguments)

    return run


def without_transforms(x: torch.Tensor) -> torch.Tensor:
    """Tensor inside the wrappers of torch.func's transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def dispatch_modes() -> list[Any]:
    """Active dispatch modes."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return list(_get_current_dispatch_mode_stack())


def process_group(name: str) -> Any:
    """Process group of this name."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    return _resolve_process_group(name)  # type: ignore[arg-type]


def fake_tensor_type() -> type[torch.Tensor]:
    """Type of tensors that have shapes but no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor
