"""All cases and behaviours in one call, and the record a claim is made from."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cce import registry
from cce.testing.behaviours import BEHAVIOURS
from cce.testing.cases import CASES, Case
from cce.testing.check import Result, run_case
from cce.testing.check_option import check_option
from cce.testing.layouts import LAYOUTS, check_layout
from cce.testing.options import OPTIONS
from cce.testing.patterns import PATTERNS, check_pattern
from cce.version import __version__

#: What :func:`check_backend` can be asked for.
GROUPS = ("cases", "behaviours", "options", "layouts", "patterns")
#: Every check of a group by its name; each takes a backend's name and a device.
_CHECKS: dict[str, dict[str, Callable[[str, str], Any]]] = {
    "behaviours": {behaviour.__name__: behaviour for behaviour in BEHAVIOURS},
    "options": {f"{group}, {x}": partial(check_option, x) for group, xs in OPTIONS.items() for x in xs},
    "layouts": {str(placed): partial(check_layout, placed) for placed in LAYOUTS},
    "patterns": {str(pattern): partial(check_pattern, pattern) for pattern in PATTERNS},
}
_LONG = frozenset(
    [f"{group}, {x}" for group, xs in OPTIONS.items() for x in xs if not x.short]
    + [str(x) for x in LAYOUTS if not x.short]
    + [str(x) for x in PATTERNS if not x.short]
    + ["compiled"]
)


@dataclass
class Report:
    """Result of :func:`check_backend`.

    Attributes:
        backend, device: what was checked, and where.
        results: one a case.
        behaviours: name of each behaviour, and its failure or "".
        options: name of each option of docs/options.md, and its failure or "".
        layouts: name of each call with tensors in a layout, and its failure or "".
        patterns: name of each call with NaN or infinities among its values, and its failure or "".
    """

    backend: str
    device: str
    results: list[Result] = field(default_factory=list)
    behaviours: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """No check failed, and some ran; cases a backend refuses with a reason do not count against it."""
        ran = [result for result in self.results if not result.refused]
        checks = self._checks()
        return bool(ran or checks) and all(result.passed for result in ran) and not any(checks.values())

    @property
    def failures(self) -> list[str]:
        lines = [f"{result.case}: {line}" for result in self.results for line in result.failures]
        return lines + [f"{name}: {line}" for name, line in self._checks().items() if line]

    def _checks(self) -> dict[str, str]:
        """Name of each check that is no case, with its group's, and its failure or ""."""
        groups = {name: getattr(self, name) for name in GROUPS if name != "cases"}
        return {f"{group}, {name}": line for group, found in groups.items() for name, line in found.items()}

    def worst(self) -> dict[str, float]:
        """Per quantity, the largest relative error of all cases."""
        names = {name for result in self.results for name in result.relative}
        return {name: max(r.relative.get(name, 0.0) for r in self.results) for name in sorted(names)}

    def __str__(self) -> str:
        refused = sum(bool(result.refused) for result in self.results)
        head = (
            f"{self.backend} on {self.device}: {'passed' if self.passed else 'FAILED'}, {len(self.results)} cases "
            f"({refused} refused), "
            + ", ".join(f"{len(getattr(self, group))} {group}" for group in GROUPS if group != "cases")
        )
        return "\n".join([head, *(f"  {line}" for line in self.failures)])

    def write(self, path: str | Path, **facts: Any) -> None:
        """Writes the record as JSON: device, versions, cases, errors, and the ``facts`` given (a commit, a date)."""
        record = {**environment(self.device), **facts, **asdict(self), "passed": self.passed, "worst": self.worst()}
        Path(path).write_text(json.dumps(record, indent=1) + "\n")


def check_backend(
    name: str,
    device: str = "cpu",
    cases: Iterable[Case] = CASES,
    groups: Collection[str] = GROUPS,
    jobs: int = 1,
    short: bool = False,
) -> Report:
    """Holds a registered backend, a third party's too, to the float64 reference.

    Args:
        name: as in ``backend=``.
        device: torch device type the tensors live on.
        cases: which ones; all by default.
        groups: those of ``GROUPS`` to run. All but "cases" go through ``cce.loss`` and ``cce.terms``: "behaviours"
            (retained graphs, ignored rows, ...), "options" (the rows of docs/options.md), "layouts" (every tensor in
            every layout), "patterns" (where NaN and infinities stand).
        jobs: processes that share the work, most of which is compilation for some backends. They know the backends of
            installed packages, not those that only this process has registered.
        short: for an interpreter that takes seconds for each check, fewer layouts and patterns, and no option that
            reaches no kernel.

    Raises:
        BackendUnavailable: it cannot be loaded.
        ValueError: a group is none of ``GROUPS``.

    >>> from cce.testing import CASES, check_backend
    >>> check_backend("torch", cases=CASES[:3], groups=["cases"]).passed
    True
    """
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        raise ValueError(f"groups: got {unknown[0]!r}, expected names out of {GROUPS}")
    registry.load(name)
    found = [case for case in cases if case.short or not short] if "cases" in groups else []
    with _mapping(jobs) as each:
        # Handed out before any result is waited for.
        results = each(_result, found, repeat(name), repeat(device))
        waiting = {}
        for group, checks in _CHECKS.items():
            chosen = checks if group in groups else {}
            if short:
                chosen = {name: check for name, check in chosen.items() if name not in _LONG}
            waiting[group] = chosen, each(_failure, chosen.values(), repeat(name), repeat(device))
        by_name = {group: dict(zip(names, lines, strict=True)) for group, (names, lines) in waiting.items()}
        return Report(name, device, list(results), **by_name)


@contextmanager
def _mapping(jobs: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """``map``, here or in ``jobs`` processes, started afresh since a GPU's context does not survive a fork."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield pool.map


def _result(case: Case, name: str, device: str) -> Result:
    try:
        return run_case(registry.load(name), case, device, product_roundoff(device))
    except Exception as error:  # whatever a backend raises is a failure of this case, not of the others
        return Result(case.name, failures=[_raised(error)])


def _failure(check: Callable[[str, str], Any], name: str, device: str) -> str:
    """Failure of a check, or ""."""
    try:
        check(name, device)
    except AssertionError as error:
        return str(error) or "failed"
    except Exception as error:
        return _raised(error)
    return ""


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def product_roundoff(device: str) -> float:
    """Roundoff of float32 products' factors: tf32's where PyTorch is set to use it."""
    tf32 = device == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return 2.0**-10 if tf32 else 0.0


def environment(device: str) -> dict[str, Any]:
    """Device and versions, for records."""
    versions: dict[str, str | None] = {"cce": __version__}
    versions |= {name: _version(name) for name in ("torch", "numpy", "triton", "cupy-cuda13x", "numba-cuda")}
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"hardware": hardware, "python": platform.python_version(), "versions": versions}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
