"""transformers' models, patched, on a GPU: the steps that ``families.py`` records."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from families import FAMILIES, SPECS, compared, within

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_step(family: str, backend: str, mode: str) -> None:
    row = compared(family, backend, mode)
    assert within(row), row
