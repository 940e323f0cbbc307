"""Where numba-cuda is not installed, none of this is collected."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]
collect_ignore_glob = [] if find_spec("numba_cuda") else ["*.py"]
