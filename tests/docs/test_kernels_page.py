"""The excerpts of docs/kernels.md are lines of the files they name, in their order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kernels.md").read_text("utf-8")
EXCERPTS = re.findall(r"^`(cce/\S+)`\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_implementation_is_there():
    named = {name.split("/")[1 if "reference" in name else 2] for name, _ in EXCERPTS}
    assert named == {"reference", "triton", "cupy", "numba"}
    assert PAGE.count("```") == 2 * len(EXCERPTS)


@pytest.mark.parametrize(("name", "excerpt"), EXCERPTS, ids=[name for name, _ in EXCERPTS])
def test_excerpts_are_the_code(name, excerpt):
    if not (ROOT / name).parents[1].exists():
        pytest.skip(f"{name}: this tree has no such backend")
    lines = iter((ROOT / name).read_text("utf-8").splitlines())
    for line in excerpt.splitlines():
        if line.strip() not in ("", "..."):
            assert line in lines, f"{name} has no line {line!r} behind the one before"
