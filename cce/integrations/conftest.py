"""Where transformers is not installed, pytest passes by the doctests of its part."""

from importlib.util import find_spec

collect_ignore = [library for library in ("transformers",) if find_spec(library) is None]
