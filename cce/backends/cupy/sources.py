"""The CUDA sources: files in the folder ``cuda``, each read as one text with its headers."""

from __future__ import annotations

import posixpath
import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "cuda"
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


@cache
def source(name: str) -> str:
    """Text of ``cuda/name``, with each header in place of the first line that includes it.

    A compiler then needs no folder to search, and a cache's key covers everything a kernel is made from. Messages still
    name the file and the line.

    >>> "quad_max" in source("statistics.cu")
    True
    """
    return _expanded(name, set())


def _expanded(name: str, seen: set[str]) -> str:
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((FOLDER / name).read_text(encoding="utf-8").splitlines(), 1):
        found = _INCLUDE.match(line)
        included = "" if found is None else posixpath.normpath(posixpath.join(posixpath.dirname(name), found[1]))
        if line == "#pragma once" or included in seen:
            lines.append("")
        elif found is None:
            lines.append(line)
        else:
            lines += [_expanded(included, seen), f'#line {number + 1} "{name}"']
    return "\n".join(lines)
