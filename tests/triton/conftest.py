"""Where Triton is not installed, none of this is collected."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["*.py"]
