"""What a command raises when the way it was called, not the program, is at fault."""

from __future__ import annotations

from importlib.util import find_spec


class UsageError(Exception):
    """One line for stderr that names the option, its value and what was expected; the exit code is 2."""


def require(extra: str, *packages: str) -> None:
    """Checks, without importing them, that the packages of an extra are installed.

    Raises:
        UsageError: some are not; the message names them and the extra.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(f"needs {', '.join(missing)}, not installed here: pip install 'cce-kernels[{extra}]'")
