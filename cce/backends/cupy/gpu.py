"""Properties of a GPU that a launch depends on, and the share of it that a kernel takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

_RESERVED = 1024  # bytes of shared memory a thread block takes besides its own
_MOST_STAGES = 4


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        capability: compute capability, (9, 0).
        processors: number of multiprocessors.
        shared_of_block, shared: bytes of shared memory: the most for a thread block, and those of a multiprocessor.
    """

    capability: tuple[int, int]
    processors: int
    shared_of_block: int
    shared: int

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @classmethod
    def current(cls) -> Gpu:
        return _gpu(torch.cuda.current_device())

    def stages(self, stage: int, more: int, blocks: int) -> int:
        """Number of pipeline stages, of ``stage`` bytes each besides ``more``, with which ``blocks`` fit at a time."""
        fit = []
        for stages in range(2, _MOST_STAGES + 1):
            taken = stages * stage + more
            if taken <= self.shared_of_block and blocks * (taken + _RESERVED) <= self.shared:
                fit.append(stages)
        if fit or blocks == 1:
            return max(fit, default=2)
        return self.stages(stage, more, blocks - 1)

    def blocks(self, taken: int) -> int:
        """Number of thread blocks of ``taken`` bytes of shared memory that fit on one multiprocessor."""
        return self.shared // (taken + _RESERVED)


@cache
def _gpu(device: int) -> Gpu:
    from cupy.cuda import runtime

    return Gpu(
        torch.cuda.get_device_capability(device),
        runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device),
        runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
    )
