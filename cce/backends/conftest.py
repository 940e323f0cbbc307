"""Keep pytest from collecting a backend whose framework is not installed: its kernels cannot be imported."""

from importlib.util import find_spec

collect_ignore = [framework for framework in ("triton", "cupy", "numba") if find_spec(framework) is None]
