"""Backends of other packages, found by their entry points; none is imported before it is needed."""

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
    """All entry points of the group, by name; several with one name are several backends."""
    try:
        points = list(metadata.entry_points(group=ENTRY_POINT_GROUP))
    except Exception:  # one damaged installation, of any package, breaks the query for all
        points = _one_by_one()
    found: dict[str, list[EntryPoint]] = {}
    for point in points:
        others = found.setdefault(point.name, [])
        if (point.value, distribution(point)) not in [(x.value, distribution(x)) for x in others]:
            others.append(point)
    return found


def _one_by_one() -> list[EntryPoint]:
    """Entry points of every distribution that can be read, the first of each distribution name on the path."""
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
                f"cce: {text} ({type(error).__name__}: {error}); any backend among them is missing",
                RuntimeWarning,
                stacklevel=2,
            )
        if name:
            seen.add(name)
    return found


def load(name: str) -> Any:
    """Load the object of the entry point with this name, normally a backend's class.

    Raises:
        ValueError: there are several such entry points. The import may raise any other exception.
    """
    points = entry_points()[name]
    if len(points) > 1:
        found = ", ".join(f"{point.value} of {distribution(point)}" for point in points)
        raise ValueError(f"{len(points)} entry points have this name, {found}; expected one: uninstall the others")
    return points[0].load()


def distribution(point: EntryPoint) -> str:
    """Name and version of the distribution an entry point belongs to."""
    try:
        return f"{point.dist.name} {point.dist.version}"  # type: ignore[union-attr]
    except Exception:  # damaged metadata
        return "a distribution without a name"
