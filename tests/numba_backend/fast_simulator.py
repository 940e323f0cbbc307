"""Numba's simulator without its waiting: one thread of a block runs at a time, to its next barrier.

The simulator's own threads compete with a loop that asks all of them again and again whether they have arrived. Here
each hands on to the next, in one order before a barrier and in the other behind it, so that a missing barrier shows
either way. Each call of a device function puts the simulator's ``cuda`` in the place of the real one, and takes it out
again; here it stays for a launch.
"""

from __future__ import annotations

from _thread import allocate_lock
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba.cuda.simulator import kernel, kernelapi


class Thread(kernel.BlockThread):
    """A thread that runs when it has the turn."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.turn = allocate_lock()
        self.turn.acquire()

    def run(self) -> None:
        self.turn.acquire()
        if not self.abort:
            super().run()
        self._manager.end(self)

    def syncthreads(self) -> None:
        self._manager.arrive(self)
        self.turn.acquire()
        if self.abort:
            raise RuntimeError("another thread of the block failed")


class Block(kernel.BlockManager):
    """A block whose threads take turns."""

    def run(self, grid_point: Any, *arguments: Any) -> None:
        threads = [
            Thread(lambda: self._f(*arguments), self, grid_point, point, self._debug)
            for point in np.ndindex(*self._block_dim)
        ]
        self.ready, self.arrived, self.failure = threads[::-1], [], None
        self.ended = allocate_lock()
        self.ended.acquire()
        for thread in threads:
            thread.start()
        self._hand_on()
        self.ended.acquire()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            error, trace = self.failure
            raise error.with_traceback(trace)

    def arrive(self, thread: Thread) -> None:
        """At a barrier."""
        self.arrived.append(thread)
        self._hand_on()

    def end(self, thread: Thread) -> None:
        if thread.exception and self.failure is None:
            self.failure = thread.exception
            for other in (*self.ready, *self.arrived):
                other.abort = True
        self._hand_on()

    def _hand_on(self) -> None:
        if not self.ready:
            self.ready, self.arrived = self.arrived, []
        if self.ready:
            self.ready.pop().turn.release()
        else:
            self.ended.release()


class Swapped:
    """The modules whose ``cuda`` is the simulator's, for a launch."""

    def __init__(self) -> None:
        self.swap, self.push = kernel.swapped_cuda_module, kernel._push_kernel_context
        self.modules: set[int] = set()
        self.stack = ExitStack()

    @contextmanager
    def launch(self, fake: Any) -> Iterator[None]:
        with self.push(fake), ExitStack() as self.stack:
            self.modules = set()
            yield

    def call(self, function: Any, fake: Any) -> AbstractContextManager[None]:
        module = id(function.__globals__)
        if module not in self.modules:
            self.modules.add(module)
            self.stack.enter_context(self.swap(function, fake))
        return _NOTHING


_NOTHING = nullcontext()


def hasten() -> None:
    swapped = Swapped()
    kernel.BlockManager = Block
    kernel._push_kernel_context, kernel.swapped_cuda_module = swapped.launch, swapped.call
    kernelapi.numpy_support = SimpleNamespace(as_dtype=cache(kernelapi.numpy_support.as_dtype))
