"""Backends of other packages, by their entry points; none is imported before it is asked for."""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any

#: Entry-point group through which other packages add backends: ``name = "module:BackendClass"``.
ENTRY_POINT_GROUP = "cce.backends"


@lru_cache(maxsize=1)
def entry_points() -> dict[str, list[EntryPoint]]:
    """All entry points of the group, by name; several of one name are several backends."""
    try:
        points = list(metadata.entry_points(group=ENTRY_POINT_GROUP))
    except Exception:  # one damaged installation, of whatever package, and there are none for all
        points = _one_by_one()
    found: dict[str, list[EntryPoint]] = {}
    for point in points:
        others = found.setdefault(point.name, [])
        if (point.value, distribution(point)) not in [(x.value, distribution(x)) for x in others]:
            others.append(point)
    return found


def _one_by_one() -> list[EntryPoint]:
    """The entry points of every distribution that can say what it has, the first of each name on the path."""
    found: list[EntryPoint] = []
    seen: set[str] = set()
    for owner in metadata.distributions():
        name = ""
        try:
            name = owner.metadata["Name"] or ""
            if name not in seen:
                found += owner.entry_points.select(group=ENTRY_POINT_GROUP)
        except Exception as error:
            text = f"the entry points of {name or 'a distribution'} in {owner.locate_file('')} cannot be read"
            warnings.warn(
                f"cce: {text} ({type(error).__name__}: {error}); a backend among them is not there",
                RuntimeWarning,
                stacklevel=2,
            )
        if name:
            seen.add(name)
    return found


def load(name: str) -> Any:
    """The object that the entry point of this name stands for, a backend's class if all is well.

    Raises:
        ValueError: there are several. Whatever an import raises, beside that.
    """
    points = entry_points()[name]
    if len(points) > 1:
        found = ", ".join(f"{point.value} of {distribution(point)}" for point in points)
        raise ValueError(f"{len(points)} entry points have this name, {found}; expected one: uninstall the others")
    return points[0].load()


def distribution(point: EntryPoint) -> str:
    """The name and version of the distribution that an entry point is of."""
    try:
        return f"{point.dist.name} {point.dist.version}"  # type: ignore[union-attr]
    except Exception:  # metadata that is damaged
        return "a distribution without a name"
