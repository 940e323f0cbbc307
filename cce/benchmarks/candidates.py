"""Candidates to compare: every backend in every mode, and the peers, as functions of (e, c, targets)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cce
from cce import registry
from cce.backends.problem import Problem
from cce.benchmarks.heads import Head
from cce.benchmarks.peers import PEERS, Loss, Peer

#: Modes of ``cce`` to measure.
MODES = {
    "exact": cce.Spec(filter="none"),
    "filtered": cce.Spec(filter="element"),
    "uncompensated": cce.Spec(filter="element", compensate=False),
}
#: The oracle computes in float64 on one CPU thread: products of larger heads would take minutes.
_ORACLE_SIZE = 2**31


@dataclass(frozen=True)
class Candidate:
    """One way to compute the loss of a head.

    Attributes:
        name: name of the backend or the peer.
        mode: a key of ``MODES``, or another name given to a spec; "" for a peer.
        loss: loss function; None if it cannot run.
        status: "refused", "absent" or "failed" if it cannot run, with the ``reason``.
        problem, spec: those of a backend, resolved.
        peer: the peer.
    """

    name: str
    mode: str
    loss: Loss | None
    status: str = ""
    reason: str = ""
    problem: Problem | None = None
    spec: cce.Spec | None = None
    peer: Peer | None = None

    @property
    def key(self) -> str:
        return f"{self.name}, {self.mode}" if self.mode else self.name

    @property
    def filtered(self) -> bool:
        return self.spec is not None and self.spec.filter != "none"

    def products(self, forward_only: bool, live: float) -> float:
        """Least number of products of the size of ``e @ c.T``, for the roofline (docs/reproducibility.md)."""
        if forward_only:
            return 1
        if self.peer is not None:
            return self.peer.products
        assert self.problem is not None and self.spec is not None
        one_pass = registry.load(self.name).one_pass(self.problem, self.spec)
        return 3 if one_pass else 1 + 3 * live


def candidates(
    head: Head, backends: Iterable[str], specs: dict[str, cce.Spec], peers: Iterable[str]
) -> Iterator[Candidate]:
    """All combinations of backends and specs, then the peers."""
    for name in backends:
        for mode, spec in specs.items():
            yield of_backend(head, name, mode, spec)
    for name in peers:
        yield of_peer(PEERS[name])


def of_backend(head: Head, name: str, mode: str, spec: cce.Spec) -> Candidate:
    """Candidate for a backend in a mode, with its reasons if it refuses the head."""
    e, c = head.e.detach().requires_grad_(), head.c.detach().requires_grad_()
    found = cce.explain(e, c, head.targets, backend=name, spec=spec)
    reasons = found.reasons[name]
    if not reasons and name == "reference" and e.numel() * len(c) > _ORACLE_SIZE:
        reasons = ["the float64 oracle on the CPU, not meant for heads of this size"]
    if reasons:
        return Candidate(name, mode, None, "refused", " ".join("; ".join(reasons).split()))
    return Candidate(
        name,
        mode,
        lambda e, c, targets: cce.loss(e, c, targets, backend=name, spec=spec),
        problem=found.problem,
        spec=found.spec,
    )


def of_peer(peer: Peer) -> Candidate:
    """Candidate for a peer: absent if it is not installed, failed if it cannot be made."""
    reason = peer.absent()
    if reason:
        return Candidate(peer.name, "", None, "absent", reason, peer=peer)
    try:
        return Candidate(peer.name, "", peer.make(), peer=peer)
    except Exception as error:  # an error in another package's import
        return Candidate(peer.name, "", None, "failed", one_line(error), peer=peer)


def one_line(error: BaseException) -> str:
    """Describe an error in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" + ("…" if len(text) > 200 else "")
