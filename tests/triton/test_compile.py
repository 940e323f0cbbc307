"""Every kernel compiles for sm_80, sm_90 and sm_100, uses what the architecture has, and fits on it.

All settings compile for sm_90. For the others do those that take other instructions there, as much shared memory as
there is, or more registers than there are; the rest differs in what happens before any architecture is asked.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
from launches import ARCHITECTURES, Architecture, Compiled, Setting, cache_folder_of, compile_launches, launched_names
from spills import SPILLS, known
from triton.runtime.jit import JITFunction

from cce.backends.triton import kernels
from cce.testing import Case

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EXACT, ELEMENT = {"filter": "none"}, {"filter": "element"}
ALL = ("entropy", "weighted_logit", "prediction")


def case(spec: dict[str, object] = EXACT, dtype: torch.dtype = BF16, **options: object) -> Case:
    """A problem whose sizes are multiples of all blocks."""
    return replace(Case("", n=256, d=256, v=1024, e_dtype=dtype, c_dtype=dtype), spec=spec, **options)


ODD = {"n": 251, "d": 100, "v": 1013}  # rows of 200 bytes: no tensor maps
SETTINGS = {
    "exact": Setting(case()),
    "exact-float16": Setting(case(dtype=F16)),
    "exact-tf32": Setting(case(dtype=F32), precision="high"),
    "exact-float32": Setting(case(dtype=F32)),
    "exact-odd": Setting(case(bias=True, **ODD)),
    "exact-mixed": Setting(case(c_dtype=F32), precision="high"),
    "exact-softcap": Setting(case(softcap=30.0)),
    "exact-everything": Setting(
        case(k=2, bias=True, softcap=30.0, logit_scale=2.0, outputs=ALL, logit_weight=True, vocab_order=True)
    ),
    "exact-smoothing": Setting(case(bias=True, outputs=("weighted_logit",))),
    "filtered": Setting(case(ELEMENT)),
    "filtered-few-rows": Setting(case(ELEMENT), programs=132),
    "filtered-float16": Setting(case(ELEMENT, dtype=F16)),
    "filtered-tf32": Setting(case(ELEMENT, dtype=F32), precision="high"),
    "filtered-float32": Setting(case(ELEMENT, dtype=F32)),
    "filtered-order": Setting(case(ELEMENT, vocab_order=True)),
    "filtered-softcap": Setting(case(ELEMENT, softcap=30.0)),
    "filtered-entropy": Setting(case(ELEMENT, outputs=("entropy",))),
    "filtered-soft-targets": Setting(case(ELEMENT, k=2)),
    "filtered-bias": Setting(case({**ELEMENT, "row_order": "natural"}, bias=True, logit_scale=2.0)),
    "filtered-odd": Setting(case(ELEMENT, bias=True, **ODD)),
    "filtered-small-blocks": Setting(case({**ELEMENT, "block_n": 16, "block_v": 32})),
    "filtered-wide-blocks": Setting(case({**ELEMENT, "block_v": 256})),
    "filtered-online": Setting(case({**ELEMENT, "lse_accumulation": "online"})),
    "filtered-little-scratch": Setting(case({**ELEMENT, "scratch_bytes": 2**18})),
    "filtered-wide-offsets": Setting(case(ELEMENT), wide=True),
    "filtered-frozen-e": Setting(case(ELEMENT, wanted=("c",))),
    "filtered-frozen-c": Setting(case(ELEMENT, wanted=("e",))),
    "filtered-everything": Setting(
        case(ELEMENT, k=2, bias=True, softcap=30.0, logit_scale=2.0, outputs=("entropy", "prediction"))
    ),
    "filtered-by-mass": Setting(case({"filter": "tile", "compensate": False})),
}
EVERYWHERE = (
    "exact", "exact-tf32", "exact-float32", "exact-odd", "exact-smoothing", "exact-everything", "filtered",
    "filtered-float32", "filtered-odd", "filtered-bias", "filtered-small-blocks", "filtered-wide-blocks",
    "filtered-everything",
)  # fmt: skip
CHOSEN = {"sm_80": EVERYWHERE, "sm_90": tuple(SETTINGS), "sm_100": (*EVERYWHERE, "filtered-entropy")}
COMPILED = [(architecture, name) for architecture in ARCHITECTURES for name in CHOSEN[str(architecture)]]


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cache_folder_of(tmp_path_factory):
        yield


IEEE = ("exact-float32", "filtered-float32")  # no matrix unit has these products


BOXES = ("exact", "filtered", "exact-float16", "filtered-float16")  # matrices in their own order
SUBTRACTED = ("statistics_kernel", "live_kernel")  # of filtered-bias, which has a logit scale


@pytest.mark.parametrize(("architecture", "name"), COMPILED, ids=str)
def test_compiles(architecture: Architecture, name: str) -> None:
    """Products are the matrix unit's, boxes are loaded as such, shared memory suffices, few registers are spilled."""
    kernels = compile_launches(SETTINGS[name], architecture)
    wrong = [f"{kernel.name}: {line}" for kernel in kernels for line in faults(kernel, architecture, name)]
    assert not wrong, "\n".join(wrong)
    products = {kernel.name for kernel in kernels if kernel.multiplies}
    assert len(products) >= (3 if name in BOXES else 1)
    assert name != "filtered-bias" or products >= set(SUBTRACTED)


def faults(kernel: Compiled, architecture: Architecture, name: str) -> list[str]:
    found = []
    if f".target {architecture.ptx}" not in kernel.ptx:
        found.append(f"not made for {architecture.ptx}")
    products = [architecture.product]
    if "small-blocks" in name:  # than the 64 rows that later matrix units want
        products.append("mma.sync")
    if kernel.multiplies and name not in IEEE and not any(product in kernel.ptx for product in products):
        found.append(f"its product is not {' or '.join(products)}")
    if kernel.boxes and "cp.async.bulk.tensor" not in kernel.ptx:
        found.append(f"{', '.join(kernel.boxes)} not loaded or stored as boxes")
    if kernel.multiplies and name in BOXES and not operands_are_boxes(kernel, architecture):
        found.append(f"boxes are {kernel.boxes}, expected e and c where {architecture} has boxes")
    if name == "filtered-bias" and kernel.name in SUBTRACTED and not subtracts_what_is_rounded(kernel):
        found.append("a difference of logits became part of a multiply-add")
    if kernel.shared > architecture.shared:
        found.append(f"takes {kernel.shared} bytes of shared memory, there are {architecture.shared}")
    if kernel.stack > known(str(architecture), name, kernel.name):
        found.append(f"spills {kernel.stack} bytes, known are {known(str(architecture), name, kernel.name)}")
    return found


def operands_are_boxes(kernel: Compiled, architecture: Architecture) -> bool:
    """Whether e and c are read by descriptors, where the architecture has them, and nowhere else."""
    return {"e", "c"} <= set(kernel.boxes) if architecture.capability >= (9, 0) else not kernel.boxes


def subtracts_what_is_rounded(kernel: Compiled) -> bool:
    """No difference to a maximum or a log-sum-exp became part of a multiply-add: each exponential has its own.

    The targets' logits, of another kernel, would else differ from these by a rounding: at a large offset, by much.
    """
    exponentials, differences = (
        len(re.findall(name, kernel.ptx)) for name in (r"\bex2\.approx", r"\bsub(\.rn)?(\.ftz)?\.f32\b")
    )
    return 0 < exponentials <= differences


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_nothing_is_left_out(architecture: Architecture) -> None:
    """Every kernel of the package is among those compiled, and every known spill among the settings."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)
    ]
    written = {
        name for module in modules for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }  # fmt: skip
    chosen = CHOSEN[str(architecture)]
    assert written == {name for setting in chosen for name in launched_names(SETTINGS[setting], architecture)}
    assert set(SPILLS[str(architecture)]) <= set(chosen)
