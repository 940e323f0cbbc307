"""The version of this package, of which pyproject.toml has a copy."""

__version__ = "0.1.0"
