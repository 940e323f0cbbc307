"""Keep pytest from collecting the doctests for transformers if it is not installed."""

from importlib.util import find_spec

collect_ignore = [library for library in ("transformers",) if find_spec(library) is None]
