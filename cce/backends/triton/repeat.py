"""A kernel launched many times with few arguments changing, in one call or from call to call.

Triton binds and specialises every argument anew at each launch, which for kernels of fifty arguments takes longer than
some of them run. What it compiled can be launched again with a list of arguments: that is done here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cce.backends.triton.triton_private import launcher, unspecialized


class _Version(NamedTuple):
    """What was compiled: its launch, its arguments, with None for those that change, and the places of these."""

    launch: Any
    values: list[Any]
    places: list[int]


class Repeated:
    """Launches ``kernel[grid]`` with ``arguments``; those that change are given at each call.

    Triton compiles a version for each dtype, alignment and kind of integer it meets. What changes is looked at as
    Triton would (see :func:`_kind`), and a version is launched again only for arguments of the kinds it was compiled
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
            if isinstance(x, Tensor):  # the most frequent; its pointer is launched, as a number
                given[i] = pointer = x.data_ptr()
                kinds += (x.dtype, pointer & 15)
                kinds[len(given)] = kinds[len(given)] or x.device  # of one is that of all
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
        """The first launch with arguments of these kinds, through Triton."""
        compiled = self._kernel[self._grid](**self._arguments, **changed, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            launch = launcher(compiled, self._grid + (1,) * (3 - len(self._grid)))
            names = self._kernel.arg_names
            values = [self._arguments.get(name) for name in names]
            self._versions[key] = _Version(launch, values, [names.index(name) for name in changed])


def _kind(x: Any) -> object:
    """What Triton compiles and loads for: equal kinds, one version. Integers by value, which tells more apart."""
    if isinstance(x, TensorDescriptor):
        return x.base.device, x.base.dtype, *x.block_shape
    return type(x), x


def _width(x: Any) -> object:
    """The same of an integer in the kernel's ``do_not_specialize``."""
    return "int32" if type(x) is int and -(2**31) <= x < 2**31 else _kind(x)
