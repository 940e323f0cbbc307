"""The kernels compile for sm_80 and sm_90a, multiply in the matrix unit, and keep their numbers in registers."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from recorded import A100, H100, kernels_of_loss

import cce
from cce.backends.numba.choice import GPU
from cce.backends.numba.cubin import ptx_of
from cce.backends.numba.launch import Kernel

GPUS = {"sm_80": A100, "sm_90a": H100}
SHARED = {"sm_80": 166_912, "sm_90a": 232_448}  # bytes that a block of threads may have
SETTINGS = {
    "exact": {"spec": cce.Spec(filter="none")},
    "filtered": {"spec": cce.Spec(filter="element")},
}
PRODUCTS = ("statistics", "gradient", "live", "products")


@cache
def assembler() -> Path:
    """ptxas: Numba's PTX is newer than one of the two assemblers in Triton's wheel."""
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"


@cache
def kernels(setting: str, gpu: GPU) -> list[Kernel]:
    return kernels_of_loss(gpu, 512, 256, 1024, **SETTINGS[setting])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("arch", GPUS)
def test_compiles(arch: str, setting: str, tmp_path: Path) -> None:
    wrong = []
    for kernel in kernels(setting, GPUS[arch]):
        ptx = ptx_of(kernel, GPUS[arch].capability).code.decode()
        name = kernel.name
        wrong += [f"{name}: {fault}" for fault in faults(arch, kernel, ptx)]
        wrong += [f"{name}: {stack} bytes of stack" for stack in [stack_bytes(arch, ptx, tmp_path)] if stack]
    assert not wrong, "\n".join(wrong)


def faults(arch: str, kernel: Kernel, ptx: str) -> list[str]:
    found = []
    name = kernel.name
    if f".target {arch}" not in ptx:
        found.append(f"not made for {arch}")
    if name in PRODUCTS:
        wanted = "wgmma.mma_async" if arch == "sm_90a" else "mma.sync"
        if wanted not in ptx or "cp.async" not in ptx:
            found.append(f"no {wanted}, or no cp.async")
    if kernel.shared > SHARED[arch] // kernel.resident:
        found.append(f"{kernel.shared} bytes of shared memory, {kernel.resident} times")
    return found


def stack_bytes(arch: str, ptx: str, folder: Path) -> int:
    """Of a thread: where registers spill to, and arrays that did not make it into registers lie."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [str(assembler()), "-v", f"-arch={arch}", str(source), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(re.findall(r"(\d+) bytes stack frame", done.stderr)[-1])


def test_settings_have_all_kernels() -> None:
    """Every kernel but that of dbias, which has no product, is among those compiled."""
    made = {kernel.name for setting in SETTINGS for kernel in kernels(setting, H100)}
    assert made == {*PRODUCTS, "target_logits", "mean_rows", "dead_mass"}
