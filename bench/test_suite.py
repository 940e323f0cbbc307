"""pytest-benchmark cases: ``pytest bench/``. Backends, peers, modes, passes and heads are those of ``cce bench``.

    pytest bench/ --benchmark-group-by=param:shape,param:which -k "gpt2"

A case that cannot run is skipped with its reasons; one whose result is wrong fails and has no time.
"""

from __future__ import annotations

import pytest
import torch

import cce
from cce.benchmarks import heads, measure, shapes
from cce.benchmarks.candidates import MODES, of_backend, of_peer
from cce.benchmarks.oracle import Oracle
from cce.benchmarks.peers import PEERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = shapes.GPU_SHAPES if DEVICE == "cuda" else shapes.QUICK["cpu"]
CASES = [(name, mode) for name in cce.list_backends() for mode in MODES] + [(name, "") for name in PEERS]


@pytest.fixture(scope="module", params=["random", "synthetic"])
def data(request):
    return request.param


@pytest.fixture(scope="module", params=SHAPES)
def oracle(request, data):
    shape = shapes.parse(request.param)
    make = heads.random if data == "random" else heads.synthetic
    return Oracle(make(shape.n, shape.d, shape.v, DTYPE, DEVICE))


@pytest.mark.parametrize("which", measure.PASSES)
@pytest.mark.parametrize(("name", "mode"), CASES, ids=lambda part: part or "peer")
def test_loss(benchmark, oracle, name, mode, which):
    if which == "forward" and mode not in ("", "exact"):
        pytest.skip("a forward has no filter")
    made = of_peer(PEERS[name]) if name in PEERS else of_backend(oracle.head, name, mode, MODES[mode])
    entry = measure.checked(oracle, made, which)
    if entry.row["status"] in ("refused", "absent"):
        pytest.skip(entry.row["reason"])
    assert entry.row["status"] == "ok", entry.row["reason"]
    benchmark.extra_info.update({key: x for key, x in entry.row.items() if isinstance(x, float)})

    def run():
        entry.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
