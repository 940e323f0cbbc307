"""Tests of the kernels' results without a GPU: in a process that has chosen Triton's interpreter.

``TRITON_INTERPRET=1 pytest tests/triton/interpreted``; elsewhere they are skipped: ``../test_interpreted.py`` runs it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # where these tests find calls.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, skip = Path(__file__).parent, pytest.mark.skip(reason="needs TRITON_INTERPRET=1")
    for item in items:
        if here in item.path.parents and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(skip)


pytestmark = pytest.mark.usefixtures("one_thread")
