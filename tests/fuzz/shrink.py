"""A failing plan made smaller, as long as it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from plan import Plan


def shrink(plan: Plan, failures: Callable[[Plan], list[str]], most: int = 80) -> Plan:
    """The smallest plan found in ``most`` calls.

    Args:
        plan: one that fails.
        failures: what is wrong with a plan.
        most: calls to spend.
    """
    wrong = _kind(failures(plan))
    smaller = _smaller(plan)
    for _ in range(most):
        candidate = next(smaller, None)
        if candidate is None:
            break
        try:
            found = _kind(failures(candidate))
        except Exception:  # no call that could be made: a tensor or a number is missing
            continue
        if found == wrong:
            plan, smaller = candidate, _smaller(candidate)
    return plan


def _kind(failures: list[str]) -> str:
    """What the first failure is about, without its numbers."""
    return re.sub(r"[-+\d.e()\[\], ]+", "#", failures[0])[:60] if failures else ""


def _smaller(plan: Plan) -> Iterator[Plan]:
    """Plans with one thing less, the largest steps first."""
    for name in ("offset", "broken", "spec", "ignored", "upstream", "data"):
        plain = getattr(Plan(0), name)
        if getattr(plan, name) != plain:
            yield replace(plan, **{name: plain})
    for name in ("v", "d", "k"):
        size = getattr(plan, name)
        for smaller in (size // 2, size - 1):
            if 1 <= smaller < size:
                yield replace(plan, **{name: smaller})
    for i, size in enumerate(plan.lead):
        for smaller in (size // 2, size - 1):
            if 1 <= smaller < size:
                yield replace(plan, lead=(*plan.lead[:i], smaller, *plan.lead[i + 1 :]))
    if len(plan.lead) > 1:
        yield replace(plan, lead=plan.lead[1:])
    for name in ("layouts", "kinds", "options", "spec"):
        entries = getattr(plan, name) or {}
        for key in entries:
            yield replace(plan, **{name: {k: x for k, x in entries.items() if k != key}})
    for key in plan.wants:
        yield replace(plan, wants=tuple(x for x in plan.wants if x != key))
    for key in plan.dtypes:
        yield replace(plan, dtypes={k: x for k, x in plan.dtypes.items() if k != key})
