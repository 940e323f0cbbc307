"""The `cupy` backend: the kernels in CUDA C++ (``cuda/``), compiled by NVRTC when they are first needed."""
