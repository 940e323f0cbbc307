"""The tuner of the ``triton`` backend's launch configurations."""

from cce.tuning.tuner import autotune

__all__ = ["autotune"]
