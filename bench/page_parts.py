"""What the sections of docs/benchmarks.md have in common: who is best, who is missing, where a record comes from."""

from __future__ import annotations

from cce.benchmarks import table
from cce.benchmarks.peers import PEERS
from cce.benchmarks.record import Row

STEP = "forward+backward"


def provenance(facts: Row) -> str:
    """Device, versions, date and commit."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return f"{facts['hardware']}, Python {facts['python']}, {versions}; {facts['date']}, commit `{facts['commit']}`"


def best(rows: list[Row], name: str, unit: str) -> str:
    """Who has the least, whether others are as good, and how our best compares where it is not ours."""
    whole = [row for row in rows if row["status"] == "ok" and name in row and not leaves_out(row)]
    if name == "time_ms":
        whole = [row for row in whole if row.get("rounds") != 1]
        if not whole:
            return "no time was taken more than once"
    known = sorted(whole, key=lambda row: row[name])
    if not known:
        return "nobody could be measured"
    first = known[0]
    text = f"{label(first)}, {first[name]:,.4g} {unit}"
    if name == "time_ms":
        close = [row for row in known[1:] if row["time_low_ms"] <= first["time_high_ms"]]
        if close:
            text += f"; not clearly slower: {', '.join(map(label, close))}"
    others = [row for row in known if is_peer(row) != is_peer(first)]
    if others:
        whose = "of cce" if is_peer(first) else "of the others"
        ratio = others[0][name] / first[name]
        text += f"; the best {whose}: {label(others[0])}, {others[0][name]:,.4g} {unit} ({ratio:.2f} ×)"
    return text


def leaves_out(row: Row) -> bool:
    """Gradients are skipped and nothing stands for them: in the tables, but no answer to who is best."""
    return row["mode"] == "uncompensated" or (is_peer(row) and PEERS[row["name"]].approximate)


def is_peer(row: Row) -> bool:
    return "lacks" in row


def label(row: Row) -> str:
    """What a row measures, for a reader.

    >>> label({"name": "torch", "mode": "exact"}), label({"name": "liger", "mode": "", "lacks": []})
    ('`torch` exact', 'liger')
    """
    if is_peer(row) or row["name"] == "mm":
        return str(row["name"])
    return f"`{row['name']}` {row['mode']}".rstrip()


def step(row: Row) -> str:
    return {STEP: "step"}.get(row["pass"], row["pass"])


def missing(rows: list[Row], only: tuple[str, ...]) -> list[str]:
    """Who has no time, and why, for these of the reasons."""
    timed = [row for row in rows if row["kind"] == "time" and row["status"] in only]
    return [line.replace("|", "/") for line in table.without_time(timed)]
