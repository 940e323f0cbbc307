"""docs/numba-kernel.md: its code runs in the simulator, and what it quotes is what the files say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r'```python title="([^"]+)"\n(.*?)```', (ROOT / "docs/numba-kernel.md").read_text("utf-8"), re.S)
QUOTES = [(file, text) for file, text in BLOCKS if file != "simulator"]


def test_its_code_runs() -> None:
    code = "\n".join(text for file, text in BLOCKS if file == "simulator")
    assert code.count("assert") >= 3
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", range(len(QUOTES)))
def test_quotes_are_of_the_file(number: int) -> None:
    file, quote = QUOTES[number]
    text = (ROOT / "cce/backends/numba" / file).read_text("utf-8")
    lines = quote.strip("\n").splitlines()
    found = [
        "\n".join(line[len(indent) :] for line in text[match.start() :].splitlines()[: len(lines)])
        for match in re.finditer(rf"^([ ]*){re.escape(lines[0])}$", text, re.M)
        for indent in [match[1]]
    ]
    assert "\n".join(lines) in found, f"not in {file}:\n{quote}"
