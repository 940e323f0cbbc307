"""All private parts of Triton that this package uses, so that a new Triton can break only one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from cce.torch_private import current_device, raw_stream


def unspecialized(kernel: Any) -> frozenset[str]:
    """Names of the arguments for whose values a kernel is not specialised; empty in the interpreter."""
    return frozenset(param.name for param in getattr(kernel, "params", ()) if param.do_not_specialize)


def compiled_versions(kernel: Any) -> list[Any]:
    """Compiled versions of a kernel, on all devices; none in the interpreter."""
    caches = getattr(kernel, "device_caches", {})
    return [version for cache, *_ in caches.values() for version in cache.values()]


def spilled_registers(compiled: Any) -> int:
    """Number of registers per thread that a compiled kernel spills to memory."""
    return getattr(compiled, "n_spills", None) or 0


def launcher(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return ``compiled[grid]`` without the metadata it prepares for profiler hooks, unless one is set."""
    usual: Callable[..., None] = compiled[grid]
    run, function, metadata = (getattr(compiled, name, None) for name in ("run", "function", "packed_metadata"))
    if run is None or function is None or metadata is None:
        return usual
    runtime = triton.knobs.runtime

    def launch(*values: Any) -> None:
        if _calls_something(runtime.launch_enter_hook) or _calls_something(runtime.launch_exit_hook):
            usual(*values)
            return
        stream = raw_stream(current_device())
        run(*grid, stream, function, metadata, None, None, None, *values)

    return launch


def _calls_something(hook: Any) -> bool:
    """Whether a hook does anything: a chain of hooks, possibly empty; in other releases, a hook or None."""
    return bool(hook.calls) if isinstance(hook, triton.knobs.HookChain) else hook is not None


def correct_bfloat16() -> None:
    """Correct bfloat16 in Triton's interpreter, which multiplies its bits as integers and truncates.

    Products widen bfloat16 factors, and conversions from float32 round to nearest even. Seen in Triton 3.6.0 and 3.9.0.
    """
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, _widened(self, a), _widened(self, b), d, *options)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def _widened(self: Any, x: Any) -> Any:
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    # Conversions also go through this function, and were bound to the one it replaces.
    builder.create_fp_trunc = lambda self, src, dst_type: self.cast_impl(src, dst_type)


def _rounded(x: np.ndarray) -> np.ndarray:
    bits = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(torch.bfloat16).view(torch.int16).numpy()
    return bits.view(np.uint16).reshape(np.shape(x))
