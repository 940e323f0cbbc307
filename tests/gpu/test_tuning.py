"""Tuning takes real times, and what it finds is used by this process and the next, with the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heads import peaked

import cce
from cce.tuning import autotune, candidates
from cce.tuning.search import Tuned

pytestmark = pytest.mark.gpu

SPECS = {
    "one pass": cce.Spec(filter="none"),
    "exact": cce.Spec(filter="none", scratch_bytes=2**23),
    "filtered": cce.Spec(filter="element", vocab_order="natural"),
}
KERNELS = {
    "one pass": {"forward", "dense"},
    "exact": {"forward", "dense"},
    "filtered": {"forward", "sparse", "de", "dc"},
}
#: Of the candidates; all of them take minutes to compile.
FEW = 2
#: Another process, which prints the tiles of its launches.
USE = """
import json, sys, torch, cce
from cce.backends.triton import call
seen, original = [], call.choose
call.choose = lambda *arguments: seen.append(original(*arguments)) or seen[-1]
e, c, targets = torch.load(sys.argv[1])
found = {}
for name, (key, kernels) in json.loads(sys.argv[2]).items():
    seen.clear()
    spec = cce.Spec.from_key(key)
    cce.loss(e.requires_grad_(), c.requires_grad_(), targets, backend="triton", spec=spec).backward()
    found[name] = [[launch.tuned, {kernel: str(tile) for kernel, tile in launch.tiles(kernels).items()}]
                   for launch in seen]
print(json.dumps(found))
"""


def test_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, table = tmp_path / "launch", candidates._table
    monkeypatch.setenv("CCE_TUNE_CACHE", str(folder))
    monkeypatch.setattr(candidates, "_table", lambda *arguments: table(*arguments)[1 : 1 + FEW])
    head = peaked(1024, 256, 16_384)
    chosen = {}
    for name, spec in SPECS.items():
        e, c = head.leaves()
        before = gradients(e, c, head.targets, spec)
        tuned = autotune(e, c, head.targets, spec=spec, rounds=1)
        print(tuned)  # shown with -s
        check(name, tuned)
        for x, y in zip(gradients(e, c, head.targets, spec), before, strict=True):
            assert (x.float() - y.float()).norm() <= 2e-3 * y.float().norm()
        chosen[name] = {kernel: str(getattr(tuned.launch, kernel)) for kernel in KERNELS[name]}

    torch.save((head.e, head.c, head.targets), tmp_path / "head.pt")
    for name, found in in_another_process(tmp_path / "head.pt", folder).items():
        assert found
        for is_tuned, tiles in found:
            assert is_tuned, name
            assert tiles == chosen[name]
    for name, found in in_another_process(tmp_path / "head.pt", "off").items():
        assert found and not any(is_tuned for is_tuned, _ in found), name


def check(name: str, tuned: Tuned) -> None:
    """Every kernel has been timed, and a tile chosen."""
    assert {row.kernel for row in tuned.rows} == KERNELS[name]
    for kernel in KERNELS[name]:
        rows = [row for row in tuned.rows if row.kernel == kernel]
        (chosen,) = (row for row in rows if "chosen" in row.note)
        assert chosen.tile == getattr(tuned.launch, kernel)
        assert chosen.ms is not None and 0 < chosen.ms < 1000
        # These candidates were made for such a GPU; one that gives another answer would be a bug.
        assert len(rows) > 1 and sum(row.ms is not None for row in rows) > len(rows) / 2, tuned
        assert not [row for row in rows if "differs" in row.note], tuned


def gradients(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, spec: cce.Spec) -> list[torch.Tensor]:
    loss = cce.loss(e, c, targets, backend="triton", spec=spec)
    return [loss.detach(), *torch.autograd.grad(loss, (e, c))]


def in_another_process(path: Path, folder: Path | str) -> dict[str, list[list[object]]]:
    asked = json.dumps({name: [spec.key, sorted(KERNELS[name])] for name, spec in SPECS.items()})
    done = subprocess.run(
        [sys.executable, "-c", USE, path, asked],
        env={**os.environ, "CCE_TUNE_CACHE": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_out_of_shared_memory_is_a_fault() -> None:
    """The driver's refusal leaves the tile out; what runs after it is well."""
    from cce.backends.triton.launch import Tile, fitted
    from cce.tuning.prepare import prepare

    e, c = peaked(512, 512, 8192).leaves()
    targets = torch.zeros(512, dtype=torch.int64, device="cuda")
    ready = prepare(e, c, targets, None, cce.Spec(filter="none", scratch_bytes=2**20), (), None, {})
    too_large = fitted(ready.launch.with_tiles({"forward": Tile(128, 256, 128, stages=4)}), ready.problem, ready.spec)
    fault = ready.runner.fault(too_large)
    assert fault is not None and "resource" in fault.lower(), fault
    assert ready.runner.fault(ready.launch) is None


def test_command(tmp_path: Path) -> None:
    """The command, where there are few candidates: of float32, whose kernels are the smallest, too."""
    arguments = ["--n", "256", "--d", "64", "--v", "2048", "--dtype", "float32", "--filter", "none", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "cce", "tune", *arguments],
        env={**os.environ, "CCE_TUNE_CACHE": str(tmp_path), "COLUMNS": "160"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("forward", "dense", "chosen", str(tmp_path)))
    assert len(list(tmp_path.glob("*.json"))) == 1
