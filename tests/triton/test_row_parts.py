"""The exact backward with the rows in several parts: when, and that it finds the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cce import Spec
from cce.backends.triton.exact import row_parts
from cce.problem import Problem

MIB = 2**20


def test_gradients() -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("row_parts.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *float32, bfloat16 = json.loads(done.stdout)
    for errors in float32:
        assert max(errors) < 3e-6, errors  # about 300 to 700 terms, each rounded to 2**-24
    assert max(bfloat16) < 2**-8, bfloat16  # dz and the gradients, rounded to 2**-9


@pytest.mark.parametrize(
    ("n", "d", "v", "mib", "expected"),
    [
        (8192, 2304, 256_000, 128, 1),
        (16_384, 1024, 151_936, 128, 1),
        (8192, 2304, 256_000, 32, 1),  # what dE saves, dC would cost
        (16_384, 1024, 151_936, 32, 4),
        (16_384, 1024, 1000, 32, 1),  # one chunk
    ],
)
def test_when(n: int, d: int, v: int, mib: int, expected: int) -> None:
    problem = Problem(n=n, v=v, d=d, e_dtype=torch.bfloat16, c_dtype=torch.bfloat16, grad_e=True, grad_c=True)
    assert row_parts(SimpleNamespace(problem=problem, spec=Spec(scratch_bytes=mib * MIB))) == expected  # type: ignore[arg-type]
