"""What the `numba` backend takes in a fresh process until its first gradients are there: compiling, loading, one step.

    python bench/first_call.py --out docs/benchmarks/numba-first-call.json

Every measurement is a process of its own. An exact and a filtered step each run in a process that finds no compiled
kernel, and in another that finds those which the first has kept. The GPU has been used before, by torch alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from warnings import catch_warnings, simplefilter

FILTERS = {"exact": "none", "filtered": "element"}
N, D, V = 512, 256, 20_000


def main() -> None:
    """Measures, prints what it finds, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--commit", help="to write into the record; default: the checkout's")
    parser.add_argument("--child", choices=FILTERS, help="one measurement, in this process")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(FILTERS[options.child])))
        return
    rows = []
    for step in FILTERS:
        with tempfile.TemporaryDirectory() as folder:
            for kernels in ("none", "kept"):
                rows.append({"step": step, "kernels": kernels, **child(step, folder)})
                print({name: round(x, 2) if isinstance(x, float) else x for name, x in rows[-1].items()}, flush=True)
    if options.out:
        from cce.benchmarks import record

        shape = {"n": N, "d": D, "v": V, "dtype": "bfloat16"}
        record.write(options.out, "cuda", options.commit, shape=shape, rows=[record.rounded(row) for row in rows])


def child(step: str, folder: str) -> dict[str, float]:
    """One measurement in a process whose compiled kernels are kept in a folder."""
    environment = {**os.environ, "CCE_NUMBA_CACHE": folder}
    command = [sys.executable, __file__, "--child", step]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measured(filter: str) -> dict[str, float]:
    """Seconds of each part; the files a process has read before may still be in memory."""
    import torch

    from cce.backends.numba.cubin import folder

    e = torch.randn(N, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    c = torch.randn(V, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    targets = torch.zeros(N, dtype=torch.int64, device="cuda")
    (e @ c.T).sum().item()  # the library's own first call

    def step() -> None:
        import cce

        spec = cce.Spec(filter=filter, scratch_bytes=2**23)  # too few for all logits
        cce.loss(e, c, targets, backend="numba", spec=spec).backward()
        torch.cuda.synchronize()

    kept = folder()
    assert kept is not None
    compiles = not list(kept.glob("*.cubin"))
    imports = seconds(import_numba) if compiles else 0.0  # where all kernels are kept, nobody needs it
    first = seconds(step)
    return {
        "import_numba_s": imports,
        "first_call_s": first,
        "both_s": imports + first,
        "second_call_s": seconds(step),
        "kernels_kept": len(list(kept.glob("*.cubin"))),
    }


def import_numba() -> None:
    """What a first call imports when it has to compile."""
    with catch_warnings():
        simplefilter("ignore", DeprecationWarning)  # as cubin.py does
        for module in ("cce.backends.numba.compile", "cce.backends.numba.device", "cuda.core", "cuda.bindings.driver"):
            import_module(module)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
