"""Where a framework is not installed, pytest passes by the backend named after it: its kernels cannot be imported."""

from importlib.util import find_spec

collect_ignore = [framework for framework in ("triton", "cupy", "numba") if find_spec(framework) is None]
