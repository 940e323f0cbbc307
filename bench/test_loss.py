"""pytest-benchmark cases of the loss on a CPU: ``pytest bench/``. ``bench/cpu.py`` makes the record in the docs."""

from __future__ import annotations

import cpu
import problems
import pytest

import cce

LOSSES = {"dense": cpu.dense, **{name: cpu.with_spec(spec) for name, spec in cpu.SPECS.items()}}


@pytest.fixture(scope="module", params=[problems.random, problems.peaked], ids=lambda make: make.__name__)
def head(request):
    return request.param()


@pytest.mark.parametrize("name", LOSSES)
def test_forward_backward(benchmark, head, name):
    run = cpu.step(LOSSES[name], head)
    benchmark.extra_info["peak_mib"] = cpu.peak_bytes(run, head.e.device) / 2**20
    if name in cpu.SPECS:
        benchmark.extra_info["live_fraction"] = cce.live_fraction(head.e, head.c, head.targets, spec=cpu.SPECS[name])
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
