"""The state of a patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Patch:
    """State of a patched forward.

    Attributes:
        original: forward it calls, a function whose first argument is the model.
        before: attributes of the class (the instance) that the patch replaced; unpatch restores them.
        options: options of ``cce.loss``.
        warned: names of warnings already given, and of checks already made.
        active: False after unpatch, for code that kept the forward of a class.
    """

    original: Callable[..., Any]
    before: dict[str, Any]
    options: dict[str, Any]
    warned: set[str] = field(default_factory=set)
    active: bool = True
