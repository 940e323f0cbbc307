"""Source of a kernel, before it is compiled or run."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


class Source:
    """A kernel of the folder ``kernels`` with its options.

    Args:
        make: module of the folder, and its function that makes a Python function from the options; the parameters of
            the latter are annotated with their types.
        options: a frozen dataclass whose repr identifies it.
        threads: number of threads in a block. resident: number of thread blocks on a multiprocessor.
    """

    def __init__(self, make: str, options: Any, threads: int, resident: int) -> None:
        self.make, self.options = make, options
        self.threads, self.resident = threads, resident

    @property
    def name(self) -> str:
        return self.make.split(".")[1].removeprefix("make_")

    def build(self) -> Callable[..., None]:
        """Build the Python function; this imports Numba."""
        module, name = self.make.split(".")
        function: Callable[..., None] = getattr(import_module(f"cce.backends.numba.kernels.{module}"), name)(
            self.options
        )
        return function
