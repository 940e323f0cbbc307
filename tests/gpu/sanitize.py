"""Every kernel once, on small problems, for a tool that watches them.

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --backend cupy [name ...]
(or racecheck, synccheck, initcheck)
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from cce import registry
from cce.testing import CASES, Case, run_case

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


def main() -> int:
    """Runs the cases named, or all; 1 if one fails or is refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="triton")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    backend = registry.load(options.backend)
    status = 0
    for case in SANITIZED:
        if options.names and case.name not in options.names:
            continue
        result = run_case(backend, case, "cuda")
        torch.cuda.synchronize()
        print(case, "passed" if result.passed else "FAILED", *result.failures, *result.refused, sep="\n  ", flush=True)
        status |= not result.passed
    return status


if __name__ == "__main__":
    sys.exit(main())
