"""Every kernel once, on small problems, then every tensor in every layout, for a tool that watches memory.

compute-sanitizer --tool memcheck --report-api-errors no python tests/gpu/sanitize.py [--backend NAME] [name ...]

(The driver's bindings for Python ask for functions that it has not, which is no error.) Other tools: synccheck,
initcheck, and racecheck, with ``--without-cublas``. Backends: triton (the default), cupy, cupy-portable, numba.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
from torch import Tensor

import cce
from cce import registry
from cce.backends.base import Backend
from cce.testing import CASES, LAYOUTS, Case, run_case
from cce.testing.layouts import check_layout

BF16 = torch.bfloat16
_NAMES = (
    "one-row", "one-class", "unaligned", "online", "masked", "scale-softcap", "mean-logit", "everything", "strided",
    "filtered", "filtered-mass-uncompensated", "filtered-small-scratch", "filtered-order-windows",
    "filtered-everything", "plain-bfloat16", "full-bfloat16", "mixed-bf16-f32",
)  # fmt: skip
#: The blocks of the matrix unit, rows that tensor maps can describe.
_LARGE = Case("", n=300, d=128, v=2000, data="peaked", e_dtype=BF16, c_dtype=BF16)
_FILTER = {"filter": "element", "threshold": 2.0**-9}
_EXTRA = (
    replace(_LARGE, name="large-exact"),
    replace(_LARGE, name="large-exact-chunks", bias=True, spec={"filter": "none", "scratch_bytes": 2**20}),
    replace(_LARGE, name="large-exact-everything", k=2, bias=True, softcap=10.0, outputs=("entropy", "prediction")),
    replace(_LARGE, name="large-filtered", spec=_FILTER),
    replace(_LARGE, name="large-filtered-bias", bias=True, spec={**_FILTER, "filter": "tile"}),
    replace(_LARGE, name="large-filtered-order", vocab_order=True, spec={**_FILTER, "threshold": 2.0**-5}),
    replace(_LARGE, name="large-filtered-entropy", softcap=10.0, outputs=("entropy",), spec=_FILTER),
    replace(_LARGE, name="large-filtered-soft-targets", k=2, spec=_FILTER),
    replace(_LARGE, name="large-filtered-block-16", spec={**_FILTER, "block_n": 16, "block_v": 32}),
)
SANITIZED = (*(case for case in CASES if case.name in _NAMES), *_EXTRA)


def backend_of(name: str) -> Backend:
    """A backend by name; "cupy-portable" is `cupy` with the kernels it has for every GPU."""
    if name == "cupy-portable":
        from cce.backends.cupy import CupyBackend

        return CupyBackend(portable=True)
    return registry.load(name)


def without_cublas() -> None:
    """Products are sums of torch's own from here on: racecheck cannot watch cuBLAS's kernels, and ends with them."""

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        found = (a.float()[:, :, None] * b.float()[None]).sum(1).to(out_dtype or a.dtype)
        return found if out is None else out.copy_(found)

    def addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        return out.copy_(total + mm(a, b, out_dtype))

    torch.mm, torch.addmm = mm, addmm
    Tensor.addmm_ = lambda total, a, b: total.add_(mm(a, b))


def main(arguments: list[str]) -> int:
    """Runs the cases named, or all; 1 if one fails or is refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--without-cublas", action="store_true", help="for racecheck")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args(arguments)
    if given.without_cublas:
        without_cublas()
    backend, names, status = backend_of(given.backend), given.names, 0
    cce.register_backend("watched", lambda: backend)
    for case in SANITIZED:
        if names and case.name not in names:
            continue
        result = run_case(backend, case, "cuda")
        torch.cuda.synchronize()
        print(case, "passed" if result.passed else "FAILED", *result.failures, *result.refused, sep="\n  ", flush=True)
        status |= not result.passed
    for placed in LAYOUTS:
        if names and str(placed) not in names:
            continue
        failure, refused = "", []
        try:
            refused = check_layout(placed, "watched", "cuda")
        except AssertionError as error:
            failure = str(error)
        torch.cuda.synchronize()
        print(placed, "FAILED" if failure else "passed", failure, *refused, sep="\n  ", flush=True)
        status |= bool(failure)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
