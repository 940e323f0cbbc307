"""The Python blocks of the README and the docs run, page by page, in the order of the page."""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
PARSER = Sybil([PythonCodeBlockParser()])
# A block that includes a file has a title, so the parser passes it by; the file has a test of its own.
PAGES = [
    page
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    if "```python\n" in page.read_text("utf-8")
]


def test_the_first_pages_have_code():
    assert {ROOT / "README.md", ROOT / "docs/index.md", ROOT / "docs/quickstart.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_blocks_run(page):
    examples = list(PARSER.parse(page).examples())
    assert len(examples) == page.read_text("utf-8").count("```python\n")
    for example in examples:
        example.evaluate()
