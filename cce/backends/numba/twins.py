"""The functions of ``intrinsics.py`` in plain Python for Numba's simulator: same names, arguments and results.

There each thread of a block is a Python thread, and threads do not run in lockstep: operations of a whole warp need a
barrier of the block. Shared memory is one array of bytes, and an address an index into it; a pointer is a
:class:`Pointer`. The fragments of a matrix instruction are spread over a warp, so these instructions have no twins:
``multiply.py`` has a twin of the product of two whole panels, in which a thread computes its own elements.
"""

from __future__ import annotations

import ctypes
import warnings
from typing import Any

import numpy as np
from numba import cuda, uint8
from torch import Tensor

F32 = np.float32
#: Bytes after the panels for values that threads pass to each other, a word of 8 bytes each.
EXCHANGE = 8


class Pointer:
    """Stand-in for a pointer: the bytes from there to the end of a tensor's memory."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    def view(self, dtype: Any) -> np.ndarray:
        """The memory as an array of a dtype, without an incomplete last element."""
        size = np.dtype(dtype).itemsize
        return self.memory[: len(self.memory) // size * size].view(dtype)


# Control


def repeat(body: Any, count: int) -> Any:
    """Make a function of a tuple that calls ``body(n, tuple)`` for n < ``count``."""

    def run(state: Any) -> None:
        for n in range(count):
            body(n, state)

    return run


# Arithmetic. A row that does not count may hold anything: suppress warnings about it.


def exp2(x: Any) -> Any:
    """2^x."""
    with np.errstate(all="ignore"):
        return np.exp2(F32(x))


def log2(x: Any) -> Any:
    """Base-2 logarithm."""
    with np.errstate(all="ignore"):
        return np.log2(F32(x))


def divide(x: Any, y: Any) -> Any:
    """x / y."""
    with np.errstate(all="ignore"):
        return F32(x) / F32(y)


def reciprocal(x: Any) -> Any:
    """1 / x."""
    return divide(1, x)


def maximum(x: Any, y: Any) -> Any:
    """The larger of two floats, NaN if either is NaN."""
    return x if x > y or x != x else y


def _round_bf16(x: Any) -> int:
    """Bits of a float's nearest bfloat16, ties to even; NaN stays NaN."""
    bits = int(np.array(x, np.float32).view(np.uint32))
    if bits & 0x7FFFFFFF > 0x7F800000:
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _round_fp16(x: Any) -> int:
    with np.errstate(all="ignore"):
        return int(np.array(np.float16(x)).view(np.uint16))


def pack_bf16(low: Any, high: Any) -> int:
    """Round two floats to bfloat16 and pack them in one word."""
    return _round_bf16(low) | _round_bf16(high) << 16


def pack_fp16(low: Any, high: Any) -> int:
    """Round two floats to float16 and pack them in one word."""
    return _round_fp16(low) | _round_fp16(high) << 16


def widen_bf16(bits: Any) -> Any:
    """Widen the bits of a bfloat16 to a float."""
    return np.array(int(bits) << 16, np.uint32).view(np.float32)[()]


def widen_fp16(bits: Any) -> Any:
    """Widen the bits of a float16 to a float."""
    return F32(np.array(bits, np.uint16).view(np.float16))


# Other lanes of the warp


device = cuda.jit(device=True)  # for functions that use ``cuda``, which the simulator replaces


@device
def barrier() -> None:
    """Wait until all threads of the block have arrived."""
    cuda.syncthreads()


@device
def _exchange(x: Any, mask: int, dtype: Any) -> Any:
    shared = cuda.shared.array(0, uint8)
    places = shared[len(shared) - EXCHANGE * cuda.blockDim.x :].view(np.int64 if dtype is np.int32 else np.float64)
    me = cuda.threadIdx.x
    places[me] = x
    cuda.syncthreads()
    other = dtype(places[me ^ mask])
    cuda.syncthreads()
    return other


def lane_xor(x: Any, mask: int) -> Any:
    """Read x from the lane whose number differs in the bits of ``mask``."""
    return _exchange(x, mask, np.float32)


def lane_xor_int(x: Any, mask: int) -> Any:
    """Like ``lane_xor``, for an integer."""
    return _exchange(x, mask, np.int32)


# Global memory


def floats(pointer: Pointer) -> np.ndarray:
    """float32 numbers at a pointer."""
    return pointer.view(np.float32)


def ints(pointer: Pointer) -> np.ndarray:
    """int32 numbers at a pointer."""
    return pointer.view(np.int32)


def longs(pointer: Pointer) -> np.ndarray:
    """int64 numbers at a pointer."""
    return pointer.view(np.int64)


def halves(pointer: Pointer) -> np.ndarray:
    """16-bit words at a pointer."""
    return pointer.view(np.uint16)


def flags(pointer: Pointer) -> np.ndarray:
    """Bytes at a pointer."""
    return pointer.view(np.uint8)


def words(pointer: Pointer) -> np.ndarray:
    """32-bit words at a pointer."""
    return pointer.view(np.uint32)


def _inside(pointer: Pointer, place: int) -> np.ndarray:
    """Read a 16-byte piece; IndexError where a GPU would access memory outside the tensor."""
    if not 0 <= 16 * place <= len(pointer.memory) - 16:
        raise IndexError(f"piece {place} of {len(pointer.memory)} bytes")
    return pointer.memory[16 * place : 16 * place + 16]


# Shared memory


def shared_address(array: np.ndarray) -> int:
    """Address of the array that is all of shared memory."""
    return 0


@device
def copy_16(address: int, pointer: Pointer, place: int, valid: bool) -> None:
    """Copy a 16-byte piece into shared memory, at once; zeros if not ``valid``."""
    shared = cuda.shared.array(0, uint8)
    shared[address : address + 16] = _inside(pointer, place) if valid else 0


def copies_commit() -> None:
    """Nothing: copies are made at once."""


def _copies_wait() -> None:
    """Nothing: copies are made at once."""


copies_wait = [_copies_wait] * 8


@device
def read_float(address: int) -> Any:
    """Read a float from shared memory."""
    return cuda.shared.array(0, uint8)[address : address + 4].view(np.float32)[0]


@device
def write_float(address: int, x: Any) -> None:
    """Write a float to shared memory."""
    cuda.shared.array(0, uint8)[address : address + 4].view(np.float32)[0] = x


@device
def read_int(address: int) -> Any:
    """Read an integer from shared memory."""
    return cuda.shared.array(0, uint8)[address : address + 4].view(np.int32)[0]


@device
def write_int(address: int, x: Any) -> None:
    """Write an integer to shared memory."""
    cuda.shared.array(0, uint8)[address : address + 4].view(np.int32)[0] = x


def draw(pointer: Pointer, place: int) -> Any:
    """Read the int32 counter at a place and increment it, atomically."""
    numbers = ints(pointer)
    found = numbers[place]
    numbers[place] += 1
    return found


@device
def read_panel(panel: int, rows: int) -> np.ndarray:
    """First rows of a panel as (rows, 128) bytes, pieces in their original order (``kernels/tiles.py``, ``spot``)."""
    shared = cuda.shared.array(0, uint8)
    pieces = shared[panel : panel + 128 * rows].reshape(rows, 8, 16)
    order = np.arange(8)[None, :] ^ (np.arange(rows) & 7)[:, None]
    return np.take_along_axis(pieces, order[:, :, None], 1).reshape(rows, 128)


def pointer_to(x: Any) -> Any:
    """Pointer to a tensor's memory from its first element on; other arguments unchanged."""
    if x is None:
        return Pointer(np.zeros(0, np.uint8))
    if not isinstance(x, Tensor):
        return x
    size = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    return Pointer(np.ctypeslib.as_array(ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_uint8)), (size,)))


def run(kernel: Any, grid: int, threads: int, shared: int, arguments: Any) -> None:
    """Run a kernel, one thread block after the other; as on a GPU, inf and NaN raise no errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        cuda.jit(kernel)[grid, threads, 0, shared](*[pointer_to(x) for x in arguments])
