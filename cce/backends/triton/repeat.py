"""A kernel launched many times with few arguments changing.

Triton binds and specialises every argument anew at each launch, which for kernels of fifty arguments takes longer than
some of them run. What it compiled can be launched again with a list of arguments: that is done here.
"""

from __future__ import annotations

from typing import Any


class Repeated:
    """Launches ``kernel[grid]`` with ``arguments``; those that change are given at each call.

    What changes must not change what is compiled: integers the kernel does not specialise, or descriptors and tensors
    of the same dtype and alignment.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: int) -> None:
        self._kernel, self._grid, self._arguments, self._options = kernel, grid, arguments, options
        self._places = {name: place for place, name in enumerate(kernel.arg_names)}
        self._launch: Any = None
        self._values: list[Any] = []

    def __call__(self, **changed: Any) -> None:
        if self._launch is not None:
            for name, value in changed.items():
                self._values[self._places[name]] = value
            self._launch(*self._values)
            return
        arguments = self._arguments | changed
        compiled = self._kernel[self._grid](**arguments, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._launch = compiled[self._grid + (1,) * (3 - len(self._grid))]
            self._values = [arguments[name] for name in self._kernel.arg_names]
