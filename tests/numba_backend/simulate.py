"""Checks of the numba backend in Numba's simulator: a process of its own, since it is chosen when Numba is imported.

``python simulate.py PART PARTS``, or ``smoke`` for a few, prints a line for each check, and what was wrong.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "kernels"))

import fast_simulator
import numpy as np
from numba import cuda, int32

from cce import registry
from cce.backends.numba.launches import NumbaKernels
from cce.testing import CASES as KIT_CASES
from cce.testing import LAYOUTS, PATTERNS, Case, run_case
from cce.testing.check_option import check_option
from cce.testing.kernels import contract
from cce.testing.kernels.cases import CASES
from cce.testing.layouts import check_layout
from cce.testing.options import OPTIONS
from cce.testing.patterns import check_pattern

#: Of the contract: each kernel with every option, in each dtype, and what is special about rows, tiles and blocks.
CONTRACT = (
    "target_logits softcap large", "target_logits sliced float16", "target_logits bf16 and float32",
    "statistics softcap large", "statistics masked low", "statistics ties", "statistics windows online",
    "statistics offset 2^20", "statistics softcap masked", "statistics weighted masked", "statistics strange",
    "statistics maps online offset", "statistics maps windows", "statistics maps softcap", "statistics maps block_v=64",
    "gradient float16 k3", "gradient tf32", "gradient masked k3", "gradient everything", "gradient nan rows",
    "gradient wide d", "gradient offset 2^20", "gradient softcap large", "gradient strange softcap",
    "live sorted ordered", "live offset 2^20", "live strange", "live nan rows", "live mixed", "live only de",
    "live odd d sorted", "live everything float16", "live blocks 16 x 16", "live blocks 32 x 64",
    "mean_rows", "mean_rows odd d", "mean_rows float32", "dead_mass", "dead_mass entropy softcap float32",
)  # fmt: skip

#: Of the kit's other groups, a few for each kernel.
OF_KIT = (
    "offset-1e3", "offset-bias-1e8",
    "mean, all column", "none, all column", "terms, all column", "filtered, all column", "mean, bias same_rows",
    "none, masked entries and a NaN row", "terms, all entries masked", "capped, masked target",
    "element, NaN upstream", "element, uncompensated, NaN in a row of c",
)  # fmt: skip


#: Checks that between them launch every kernel; the parts leave them out.
SMOKE = ("kit filtered, all column", "option `bias`", "option `vocab_order`, a permutation", "mean_rows", "dead_mass")


def of_case(case: Case) -> None:
    result = run_case(registry.load("numba"), case)
    assert result.passed, [*result.failures, *result.refused]


def of_contract(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    _, passed, message = contract.run_case(NumbaKernels(), case, "cpu", small=True)
    assert passed and not message, message


def a_missing_barrier() -> None:
    """Threads that read what another writes before the next barrier: in one order or the other it is not there yet."""

    def kernel(out: Any, barriers: int) -> None:
        places, me = cuda.shared.array(0, int32), cuda.threadIdx.x
        for turn in range(2):
            cuda.syncthreads()
            places[me] = 10 * turn + me
            for _ in range(barriers):
                cuda.syncthreads()
            out[turn, me] = places[me ^ 1]

    for barriers in (0, 1):
        out = np.zeros((2, 4), np.int32)
        cuda.jit(kernel)[1, 4, 0, 16](out, barriers)
        right = out == np.array([[1, 0, 3, 2], [11, 10, 13, 12]])
        assert right.all() if barriers else not right.all(1).any()


def checks() -> Iterator[tuple[str, Callable[[], Any]]]:
    kit: dict[str, Callable[[], Any]] = {str(case): partial(of_case, case) for case in KIT_CASES}
    kit |= {str(x): partial(check_layout, x, "numba", "cpu") for x in LAYOUTS}
    kit |= {str(x): partial(check_pattern, x, "numba", "cpu") for x in PATTERNS}
    yield "a missing barrier", a_missing_barrier
    for name in CONTRACT:
        yield name, partial(of_contract, name)
    for name in OF_KIT:
        yield f"kit {name}", kit[name]
    for option in (x for options in OPTIONS.values() for x in options):
        if option.short:
            yield f"option {option.name}", partial(check_option, option, "numba", "cpu")


def main(part: str, parts: str = "1") -> None:
    fast_simulator.hasten()
    found = list(checks())
    smoke = [(name, check) for name, check in found if name in SMOKE]
    rest = [(name, check) for name, check in found if name not in SMOKE]
    for name, check in smoke if part == "smoke" else rest[int(part) :: int(parts)]:
        start = time.perf_counter()
        try:
            check()
            outcome = "passed"
        except Exception as error:
            outcome = f"FAILED {type(error).__name__}: {error}".replace("\n", " ")[:500]
        print(f"{name}: {outcome} ({time.perf_counter() - start:.1f} s)", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
