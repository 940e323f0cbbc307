"""What a launch has to know of a GPU, and how much of it a kernel takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

_RESERVED = 1024  # bytes of shared memory a block of threads takes beside its own
_MOST_STAGES = 4


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        capability: compute capability, (9, 0).
        processors: multiprocessors.
        shared_of_block, shared: bytes of shared memory, of a block of threads at most and of a multiprocessor.
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
        """Stages of a pipeline, of ``stage`` bytes each beside ``more``, that leave room for ``blocks`` at a time."""
        fit = []
        for stages in range(2, _MOST_STAGES + 1):
            taken = stages * stage + more
            if taken <= self.shared_of_block and blocks * (taken + _RESERVED) <= self.shared:
                fit.append(stages)
        if fit or blocks == 1:
            return max(fit, default=2)
        return self.stages(stage, more, blocks - 1)

    def blocks(self, taken: int) -> int:
        """Blocks of threads whose shared memory, ``taken`` bytes each, a multiprocessor has room for."""
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
