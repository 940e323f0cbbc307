"""The error a command raises when its usage, not the program, is at fault."""

from __future__ import annotations

from importlib.util import find_spec


class UsageError(Exception):
    """Error in one line for stderr that names the option, its value and what was expected; the exit code is 2."""


def require(extra: str, *packages: str) -> None:
    """Check, without importing them, that the packages of an extra are installed.

    Raises:
        UsageError: some are missing; the message names them and the extra.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(f"needs {', '.join(missing)}, not installed here: pip install 'cce-kernels[{extra}]'")
