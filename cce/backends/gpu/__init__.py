"""Host code of the backends whose kernels are CUDA C++ or Numba: everything but the kernels themselves."""
