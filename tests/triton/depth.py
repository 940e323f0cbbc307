"""How deep a step is: calls and files of this package from ``cce.loss`` to the first launch of a kernel.

    TRITON_INTERPRET=1 python tests/triton/depth.py

Runs one filtered step of the ``triton`` backend in Triton's interpreter, the second of its kind. Kernels do not count.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import cce

PACKAGE = Path(cce.__file__).parent


class Trace:
    """Calls of functions of this package, in order, until something of Triton's interpreter is called."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.launched = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or self.launched:
            return
        if path.parts[-3:] == ("triton", "runtime", "interpreter.py"):
            self.launched = True
        elif path.is_relative_to(PACKAGE) and "kernels" not in path.parts:
            self.files.append(str(path.relative_to(PACKAGE)))


def main() -> None:
    n, v, d = 64, 256, 16
    e, c = (torch.randn(rows, d, dtype=torch.bfloat16, requires_grad=True) for rows in (n, v))
    targets, spec = torch.randint(v, (n,)), cce.Spec(filter="element", block_n=16, block_v=16)
    cce.loss(e, c, targets, backend="triton", spec=spec).backward()
    trace = Trace()
    sys.setprofile(trace)
    cce.loss(e, c, targets, backend="triton", spec=spec)
    sys.setprofile(None)
    files = list(dict.fromkeys(trace.files))
    print(f"{len(trace.files)} calls in {len(files)} files before the first launch:", *files, sep="\n  ")


if __name__ == "__main__":
    main()
