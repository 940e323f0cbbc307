"""Cache folders in which a backend keeps results that took long to find or to make."""

from __future__ import annotations

import os
from pathlib import Path


def folder_of(variable: str, name: str) -> Path | None:
    """Folder from the environment's ``variable``, else ``$XDG_CACHE_HOME/cce/NAME`` or ``~/.cache/cce/NAME``.

    None if the variable is "off", or there is no home.
    """
    given, cache = os.environ.get(variable, ""), os.environ.get("XDG_CACHE_HOME", "")
    if given.lower() == "off":
        return None
    try:
        if given:
            return Path(given).expanduser()
        # XDG: a path that is not absolute must be ignored.
        return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "cce" / name
    except RuntimeError:  # a user without a home
        return None
