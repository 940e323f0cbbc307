"""The Triton backend: fused kernels for CUDA GPUs (sm_80 and later), and for the interpreter without one."""

from cce.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
