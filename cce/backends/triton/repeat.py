"""Repeated launches of a kernel of which few arguments change, within a call or from call to call.

Triton binds and specialises every argument anew at each launch, which for kernels of fifty arguments takes longer than
some of them run. The compiled kernel can be launched again with a list of arguments; this module does so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cce.backends.triton.triton_private import launcher, unspecialized


class _Version(NamedTuple):
    """A compiled kernel: its launch, its arguments, with None for those that change, and the places of these."""

    launch: Any
    values: list[Any]
    places: list[int]


class Repeated:
    """Launcher of ``kernel[grid]`` with ``arguments``; those that change are given at each call.

    Triton compiles a version for each dtype, alignment and kind of integer it meets. Changing arguments are classified
    as Triton would (see :func:`_kind`), and a version is launched again only for arguments of the kinds it was compiled
    for. An object that outlives a call must hold no tensors: all of them are given at each call.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any) -> None:
        self._kernel, self._grid, self._arguments, self._options = kernel, grid, arguments, options
        self._unspecialized = unspecialized(kernel)
        self._versions: dict[tuple[Any, ...], _Version] = {}

    def __call__(self, **changed: Any) -> None:
        plain, given = self._unspecialized, list(changed.values())
        kinds: list[Any] = [*changed, None]
        for i, x in enumerate(given):
            if isinstance(x, Tensor):  # the most frequent kind; its pointer is passed, as a number
                given[i] = pointer = x.data_ptr()
                kinds += (x.dtype, pointer & 15)
                kinds[len(given)] = kinds[len(given)] or x.device  # all tensors share one device
            else:
                kinds.append(_width(x) if kinds[i] in plain else _kind(x))
        version = self._versions.get(key := tuple(kinds))
        if version is None:
            self._compile(key, changed)
            return
        values = version.values.copy()  # a copy: backward may run in several threads
        for place, value in zip(version.places, given, strict=True):
            values[place] = value
        version.launch(*values)

    def _compile(self, key: tuple[Any, ...], changed: dict[str, Any]) -> None:
        """Launch through Triton, for the first time with arguments of these kinds."""
        compiled = self._kernel[self._grid](**self._arguments, **changed, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            launch = launcher(compiled, self._grid + (1,) * (3 - len(self._grid)))
            names = self._kernel.arg_names
            values = [self._arguments.get(name) for name in names]
            self._versions[key] = _Version(launch, values, [names.index(name) for name in changed])


def _kind(x: Any) -> object:
    """Kind of an argument: Triton compiles one version for equal kinds. Integers count by value, which is finer."""
    if isinstance(x, TensorDescriptor):
        return x.base.device, x.base.dtype, *x.block_shape
    return type(x), x


def _width(x: Any) -> object:
    """Kind of an integer in the kernel's ``do_not_specialize``."""
    return "int32" if type(x) is int and -(2**31) <= x < 2**31 else _kind(x)
