"""The Triton backend: fused kernels for CUDA GPUs (sm_80 and later), and for the interpreter without one."""

from cce.backends.triton.backend import TritonBackend
from cce.backends.triton.tuning import autotune

__all__ = ["TritonBackend", "autotune"]
