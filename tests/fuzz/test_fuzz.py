"""About a minute of the fuzzer: the seed is printed, and CCE_FUZZ_SEED sets it; see docs/reproducibility.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plan import Limits, Plan, draw
from recipes import RECIPES
from run import fuzz
from shrink import shrink

import cce
from cce.backends.problem import Gradients, Problem
from cce.backends.torch import TorchBackend

SEED = int(os.environ.get("CCE_FUZZ_SEED", "15"))
HERE = Path(__file__).parent
#: Interpreted and simulated kernels, each chosen when its framework is imported: processes of their own.
SIMULATED = {"triton": {"TRITON_INTERPRET": "1"}, "numba": {"NUMBA_ENABLE_CUDASIM": "1"}}
CALLS = {"triton": "25", "numba": "10"}


@pytest.mark.parametrize(("backend", "calls"), [("torch", 250), ("reference", 120)])
def test_in_process(backend: str, calls: int, one_thread: None) -> None:
    """The same calls wherever it runs: about a quarter of a minute."""
    lines: list[str] = []
    tally = fuzz(backend, seed=SEED, calls=calls, say=lines.append)
    print(tally)
    assert not lines, "\n".join(lines)
    assert tally.tried > 5 * sum(tally.refused.values()) > 0


def test_simulated() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("numba_cuda")
    running = [
        subprocess.Popen(
            [sys.executable, str(HERE / "run.py"), "--backend", name, "--seed", str(SEED), "--calls", CALLS[name]],
            cwd=HERE.parents[1], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        )
        for name, environment in SIMULATED.items()
    ]  # fmt: skip
    texts = [process.communicate()[0] for process in running]
    print("\n".join(texts))
    assert all(process.returncode == 0 for process in running), "\n".join(texts)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cupy", "numba"])
def test_on_a_gpu(backend: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    lines: list[str] = []
    tally = fuzz(backend, "cuda", seed=SEED, seconds=60, variants=12, say=lines.append)
    print(tally)
    assert not lines, "\n".join(lines)
    assert tally.tried > 2 * sum(tally.refused.values())


class Slightly(TorchBackend):
    """One entry of dC is off by two thousandths."""

    def one_pass(self, problem: Problem, spec: cce.Spec) -> None:
        return None

    def backward(self, *arguments: object) -> Gradients[torch.Tensor]:
        found = super().backward(*arguments)  # type: ignore[arg-type]
        if found.dc is not None:
            found.dc[-1, -1] *= 1.002
        return found


def test_it_finds_what_is_wrong(one_thread: None) -> None:
    cce.register_backend("slightly", Slightly)
    try:
        lines: list[str] = []
        tally = fuzz("slightly", seed=SEED, calls=60, say=lines.append, smallest=False)
    finally:
        cce.unregister_backend("slightly")
    assert tally.failures and any("dc: row" in line for line in lines), lines
    assert all("--index" in failure["again"] for failure in tally.failures)


def test_a_plan_is_data() -> None:
    calls = set()
    for index in range(400):
        plan = draw(SEED, index, Limits())
        assert plan == draw(SEED, index, Limits()) == Plan.from_json(plan.to_json())
        calls.add(plan.call)
    assert calls == {"loss", "terms", "module", *RECIPES}
    assert set(RECIPES) >= set(cce.losses.__all__) - {"Evaluation", "Options", "group_advantages"}


def test_variants_share_what_is_compiled() -> None:
    plans = [draw(SEED, index, Limits(variants=3)) for index in range(30)]
    assert len({plan.to_json() for plan in plans}) == 30
    assert len({(plan.call, str(plan.dtypes), str(plan.kinds)) for plan in plans}) == 3


def test_smaller_plans() -> None:
    def failures(plan: Plan) -> list[str]:
        return ["e: 3 off"] if plan.v > 5 and "bias" in plan.kinds else []

    plan = next(plan for plan in (draw(SEED, i, Limits()) for i in range(99)) if failures(plan) and plan.spec)
    found = shrink(plan, failures, most=200)
    assert found.v == 6 and found.d == 1 and list(found.kinds) == ["bias"] and found.spec is None
