"""Fixtures of the front end's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cce import files

sys.path.append(str(Path(__file__).parent))  # where tests of all folders find meter.py


#: Files whose tests take many seconds and share nothing: each test goes to whichever process is free. Where two work,
#: other files stay together, since fixtures and caches do.
ALONE = (
    "triton/test_interpreted.py", "numba_backend/test_simulated.py", "triton/test_compile.py", "cupy/test_sm90.py",
    "numba_backend/test_compile.py", "docs/test_vocab_parallel_example.py",
)  # fmt: skip
#: They come first, and other files of many seconds: the many of a second then fill both processes to the end.
LONG = (
    *ALONE, "cupy/test_compile.py", "tests/test_compile.py", "fuzz/test_fuzz.py", "distributed/test_sharded_models.py",
    "distributed/test_vocab_parallel.py", "distributed/test_agreement.py", "distributed/test_harness.py",
    "conformance/test_mutants.py", "triton/test_candidates.py", "losses/test_options.py", "losses/test_values.py",
    "losses/test_layouts.py", "integrations/test_transformers_families.py", "integrations/test_transformers_copies.py",
    "kernels/test_host_code.py", "kernels/test_contract.py", "cupy/test_one_pass.py", "bench/test_vocab_parallel.py",
    "bench/test_page_studies.py", "cli/test_bench.py", "testing/test_conformance.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((n for n, name in enumerate(LONG) if path.endswith(name)), len(LONG))

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """That of ``--dist loadfile``, with files that are divided further."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(ALONE) else file

    return Scheduling(config, log)


@pytest.fixture
def nothing_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache warns once a process; in a test of its warnings, once a test."""
    monkeypatch.setattr(files, "_warned", set())


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers: two threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
