"""The Triton backend: fused kernels for CUDA GPUs (sm_80 and later), or interpreted without a GPU."""

from cce.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
