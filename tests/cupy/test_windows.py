"""What launches are given, window by window of the vocabulary and in every layout; the driver launches nothing."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cce.backends.cupy import arguments, gpu, launch, portable, sm90, tensor_maps
from cce.backends.gpu.arrays import Dense, Formula, Rows
from cce.backends.problem import Problem
from cce.spec import Spec

N, D, V = 300, 64, 2000
WINDOWS = ((0, 512), (512, 1280), (1280, 2000))
KINDS = {
    "sm90": (sm90.Sm90Kernels, sm90.GradientArguments, torch.bfloat16, "pitch"),
    "sm90, float32": (sm90.Sm90Kernels, arguments.GradientArguments, torch.float32, "pitch_dz"),
    "portable": (portable.PortableKernels, arguments.GradientArguments, torch.bfloat16, "pitch_dz"),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Grid and address of the arguments of each launch, of a GPU of 132 multiprocessors."""
    found: list[tuple[int, int]] = []

    def launch_kernel(function: int, x: int, *rest: Any) -> None:
        found.append((x, ctypes.c_void_p.from_address(rest[-2]).value or 0))

    hopper = gpu.Gpu((9, 0), 132, 232_448, 233_472)
    driver = SimpleNamespace(launchKernel=launch_kernel, launchCooperativeKernel=launch_kernel)
    for name in ("cupy", "cupy.cuda"):  # CuPy needs a GPU for more than its types
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(cuda=SimpleNamespace(driver=driver), driver=driver))
    monkeypatch.setattr(launch, "function", lambda variant: 1)
    monkeypatch.setattr(gpu.Gpu, "current", classmethod(lambda cls: hopper))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "raw_stream", lambda device: 0)
    encoder = SimpleNamespace(cuTensorMapEncodeTiled=lambda *arguments: 0)
    monkeypatch.setattr(tensor_maps, "_driver", lambda: encoder)
    yield found
    tensor_maps._encoded.cache_clear()  # nobody else's maps


@pytest.mark.parametrize("kind", KINDS)
def test_windows(kind: str, launched: list[tuple[int, int]]) -> None:
    kernels, struct, dtype, pitch = KINDS[kind]
    row, bias, weight = torch.zeros(N), torch.zeros(V), torch.zeros(V)
    rows = Rows(row, row, row, row[:, None], torch.zeros(N, 1, dtype=torch.int32), None, None, row)
    dense = Dense(torch.zeros(N, D, dtype=dtype), Formula(bias, 1.0, 30.0, False), rows, weight, True)
    problem = Problem(N, V, D, 1, dtype, dtype, "cpu", grad_e=True, grad_c=True)
    window = kernels().gradient(problem, Spec(filter="none"), dense)
    c, memory = torch.zeros(V, D, dtype=dtype), torch.empty(N, V, dtype=dtype)
    for number, (v0, v1) in enumerate(WINDOWS):
        dz, sums = memory[:, : v1 - v0], torch.empty(8, v1 - v0)
        window(c[v0:v1], v0, dz, sums)
        blocks, address = launched[number]
        given: Any = struct.from_address(address)
        assert blocks > 0 and (given.N, given.V, given.first) == (N, v1 - v0, v0)
        assert (given.dz, getattr(given, pitch)) == (dz.data_ptr(), V)
        assert given.column_sums == sums.data_ptr()
        assert (given.bias, given.weight) == (bias[v0:].data_ptr(), weight[v0:].data_ptr())
        if struct is arguments.GradientArguments:
            assert given.c.data == c[v0:].data_ptr()
    assert len(launched) == len(WINDOWS)


def test_a_window_without_bias(launched: list[tuple[int, int]]) -> None:
    row = torch.zeros(N)
    rows = Rows(row, row, row, row[:, None], torch.zeros(N, 1, dtype=torch.int32), None, None, None)
    e, c, dz = (torch.zeros(size, D, dtype=torch.bfloat16) for size in (N, V, N))
    problem = Problem(N, V, D, 1, torch.bfloat16, torch.bfloat16, "cpu", grad_e=True, grad_c=True)
    dense = Dense(e, Formula(None, 1.0, None, False), rows, None, False)
    sm90.Sm90Kernels().gradient(problem, Spec(filter="none"), dense)(c[100 : 100 + D], 100, dz, None)
    ((_, address),) = launched
    given = sm90.GradientArguments.from_address(address)
    assert given.first == 100 and given.bias is given.weight is given.column_sums is None


LAYOUTS = {
    "every other": lambda x: torch.stack((x, x), -1)[..., 0],
    "one number for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["bias", "weight", "order"])
def test_what_a_kernel_would_misread_is_refused(name: str, layout: str, launched: list[tuple[int, int]]) -> None:
    """A vector without a stride among the arguments is contiguous, or there is no launch."""
    given = {"bias": torch.zeros(V), "weight": torch.zeros(V), "order": torch.arange(V)}
    given[name] = LAYOUTS[layout](given[name])
    row, e, c = torch.zeros(N), torch.zeros(N, D, dtype=torch.bfloat16), torch.zeros(V, D, dtype=torch.bfloat16)
    rows = Rows(row, row, row, row[:, None], torch.zeros(N, 1, dtype=torch.int32), None, None, row)
    dense = Dense(e, Formula(given["bias"], 1.0, 30.0, False), rows, given["weight"], False)
    problem, spec = Problem(N, V, D, 1, torch.bfloat16, torch.bfloat16, "cpu"), Spec(filter="none", block_v=128)
    dz, means = torch.empty(N, V, dtype=torch.bfloat16), torch.empty(16, D, dtype=torch.bfloat16)

    def launch_with(kernels: portable.PortableKernels) -> None:
        kernels.gradient(problem, spec, dense)(c, 0, dz, None)
        kernels.mean_rows(problem, spec, c, given["order"], means)

    for kernels in (portable.PortableKernels(), sm90.Sm90Kernels()):
        launched.clear()
        with pytest.raises(ValueError, match=r"expected contiguous"):
            launch_with(kernels)
        assert len(launched) == (name == "order")


def test_strides_that_a_kernel_is_told_are_not_refused(launched: list[tuple[int, int]]) -> None:
    e, c = torch.zeros(D, N).T, torch.zeros(1, D).expand(V, D)
    targets, out = torch.zeros(N, 2, dtype=torch.int64), torch.empty(N, 2)
    portable.PortableKernels().target_logits(e, c, targets, Formula(None, 1.0, None, False), out)
    ((blocks, address),) = launched
    found = arguments.TargetsArguments.from_address(address)
    assert blocks == 2 * N
    assert (found.stride_en, found.stride_ed, found.stride_cv, found.stride_cd) == (1, N, 0, 1)
