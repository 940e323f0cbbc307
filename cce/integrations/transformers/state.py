"""The state of a patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Patch:
    """What is behind a patched forward.

    Attributes:
        original: the forward it calls, a function whose first argument is the model.
        before: what the class (the instance) had of its own in the places of the patch; unpatch puts it back.
        options: of ``cce.loss``.
        warned: what was warned of, or looked for, once.
        active: False after unpatch, for those who kept the forward of a class.
    """

    original: Callable[..., Any]
    before: dict[str, Any]
    options: dict[str, Any]
    warned: set[str] = field(default_factory=set)
    active: bool = True
