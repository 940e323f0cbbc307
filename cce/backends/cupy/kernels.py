"""The kernels a call gets: those made for the GPU at hand, or the portable ones."""

from __future__ import annotations

from cce.backends.cupy.portable import PortableKernels


class CupyKernels(PortableKernels):
    """Per method the fastest kernel there is."""
