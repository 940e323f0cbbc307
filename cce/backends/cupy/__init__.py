"""The `cupy` backend: the kernels in CUDA C++ (``cuda/``), compiled by NVRTC when they are first needed."""

from cce.backends.cupy.backend import CupyBackend as CupyBackend
