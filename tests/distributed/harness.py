"""Tests of several processes: ranks of one Gloo group that start once and run one function of a test after the other.

    def shares(group, x):                        # runs on every rank; at the top level of its file
        dist.all_reduce(x, group=group)
        return x                                 # anything that can be pickled

    def test_sum(workers):
        assert workers.run(shares, torch.ones(2), ranks=3)[0].tolist() == [3, 3]

A function that raises on any rank fails the test with the traceback of every rank that failed. Ranks that wait for it
in a collective are stopped, and started again for the next test.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: Seconds that ranks get to end by themselves after one of them has failed.
GRACE = 0.5
#: As in pyproject.toml; FSDP2 warns of any module that returns a view, as nn.Linear does.
WARNINGS = ["-W", "error", "-W", "ignore:FSDP2-wrapped module"]


class Workers:
    """``size`` processes that share a default process group, and a group of the first n for every n.

    Args:
        size: of the default group.
        timeout: seconds that a collective, and that a function, may take.
    """

    def __init__(self, size: int, timeout: float = 120.0) -> None:
        self.size, self.timeout = size, timeout
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, ranks: int | None = None) -> list[Any]:
        """What ``function(group, *arguments)`` returns on each of the first ``ranks`` (all) processes.

        Raises:
            AssertionError: it raised on a rank, a rank died, or time ran out; the processes are stopped then.
        """
        ranks = self.size if ranks is None else ranks
        if not 1 <= ranks <= self.size:
            raise ValueError(f"ranks: got {ranks}, expected 1 to {self.size}")
        if not self._processes:
            self._start()
        task = pickle.dumps((inspect.getfile(function), function.__qualname__, ranks, arguments))
        for connection in self._connections[:ranks]:
            connection.send_bytes(task)
        results, failures = self._collect(ranks)
        if failures:
            self.stop()
            lines = [f"rank {rank} of {ranks}: {text}" for rank, text in sorted(failures.items())]
            raise AssertionError("\n".join(lines))
        return [results[rank] for rank in range(ranks)]

    def stop(self) -> None:
        """Ends the processes; the next :meth:`run` starts others."""
        for connection in self._connections:
            connection.close()  # a rank that waits for work ends when it sees this
        for process in self._processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cce-ranks-")
        store = Path(self._folder.name) / "store"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        if sys.platform == "linux":  # Gloo would ask for the address of the host's name, which need not have one
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        for rank in range(self.size):
            ours, theirs = Pipe()
            arguments = [str(x) for x in (theirs.fileno(), rank, self.size, store, self.timeout)]
            command = [sys.executable, *WARNINGS, __file__, *arguments]
            self._processes.append(subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()]))
            self._connections.append(ours)
            theirs.close()

    def _collect(self, ranks: int) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {id(x): rank for rank, x in enumerate(self._connections[:ranks])}
        end = time.monotonic() + self.timeout
        while waiting:
            left = end - time.monotonic()
            ready = wait([x for x in self._connections[:ranks] if id(x) in waiting], max(0.0, left))
            if not ready:
                failures |= dict.fromkeys(waiting.values(), "did not answer in time")
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(id(connection))
                try:
                    good, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    good, value = False, "died"
                (results if good else failures)[rank] = value
            if failures:
                end = min(end, time.monotonic() + GRACE)
        return results, failures


def _work(connection: Connection, rank: int, size: int, store: str, timeout: float) -> None:
    """The life of one rank."""
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    groups = {n: dist.new_group(list(range(n)), timeout=limit) for n in range(1, size)} | {size: dist.group.WORLD}
    while True:
        try:
            file, name, ranks, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:  # the tests are over
            break
        try:
            answer = True, _load(file, name)(groups[ranks], *arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


def _load(file: str, name: str) -> Callable[..., Any]:
    """The function called ``name`` in the file of a test, which need not be importable by a name of its own."""
    if file not in _modules:
        spec = importlib.util.spec_from_file_location(f"_ranks_{Path(file).stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _modules[file] = module
    return getattr(_modules[file], name)


_modules: dict[str, Any] = {}

if __name__ == "__main__":
    descriptor, *numbers, path, seconds = sys.argv[1:]
    _work(Connection(int(descriptor)), *map(int, numbers), path, float(seconds))
