"""A section of docs/benchmarks.md that sets data beside each other: what trained states are like, a filter on them."""

from __future__ import annotations

from pathlib import Path

from page_parts import STEP, label

from cce.benchmarks.record import Record, Row

TITLE = "trained beside made-up data"
TEXT = """\
Trained states are extended to
the heads' sizes; `python -m cce.benchmarks.extend` compares them with the states as they are. In random data nearly all
probabilities are below the threshold: what a filter gains there says nothing of a model."""


def section(found: list[tuple[Path, Record]]) -> list[str]:
    """All heads of each GPU, their data side by side, if some are trained."""
    known = [(path, each) for path, each in found if "threads" not in each.facts and each.of("heads")]
    parts = []
    for hardware in dict.fromkeys(each.facts["hardware"] for _, each in known):
        parts += _of_hardware(hardware, [pair for pair in known if pair[1].facts["hardware"] == hardware])
    return parts


def _of_hardware(hardware: str, known: list[tuple[Path, Record]]) -> list[str]:
    states = {name: facts for _, each in known for name, facts in each.facts.get("trained", {}).items()}
    if not states:
        return []
    names = ", ".join(f"`docs/benchmarks/{path.name}`" for path, _ in known)
    parts = [f"## {hardware}: {TITLE}\n", f"From the records {names}. {TEXT}\n", *states_table(states)]
    rows = sorted((row for _, each in known for row in each.of("heads")), key=lambda row: row["shape"])  # stable
    for shape in dict.fromkeys(row["shape"] for row in rows):
        of_shape = [row for row in rows if row["shape"] == shape]
        parts += [f"### {shape}, data side by side\n", *statistics_table(of_shape), *filter_table(of_shape)]
    return parts


def states_table(states: dict[str, Row]) -> list[str]:
    """How the states were trained."""
    parts = [
        "| state | million parameters | width, layers | steps | seconds | held-out loss | before fine-tuning |",
        "|---|" + "--:|" * 6,
    ]
    for name, facts in states.items():
        if not facts:  # of the demo, which writes none
            parts.append(f"| {name} |" + " |" * 6)
            continue
        steps = f"{facts['steps']:,}"
        if facts["steps"] < facts["steps_planned"]:
            steps += f" of {facts['steps_planned']:,}, ended by time"
        before = f"{facts['held_out_loss_before']:.3f}" if "held_out_loss_before" in facts else ""
        parts.append(
            f"| {name} | {facts['parameters'] / 1e6:.1f} | {facts['width']}, {facts['layers']} | {steps} | "
            f"{facts['training_s']:.0f} | {facts['held_out_loss']:.3f} | {before} |"
        )
    return [*parts, ""]


def statistics_table(rows: list[Row]) -> list[str]:
    """The statistics of the data, a line each."""
    parts = [
        "| data | entropy, nats | loss | entries a row above 2⁻¹² | the others' mass | mean row / mean norm, e | c |",
        "|---|" + "--:|" * 6,
    ]
    parts += [
        f"| {row['data']} | {row['entropy']:.2f} | {row['nll']:.2f} | {row['hits']:.0f} | "
        f"{row['tail_mass']:.3f} | {row['mean_norm_e']:.2f} | {row['mean_norm_c']:.2f} |"
        for row in rows
        if row["kind"] == "data" and row["status"] == "ok"
    ]
    return [*parts, ""]


def filter_table(rows: list[Row]) -> list[str]:
    """Live fraction, errors and time of every compensated filter, beside the same backend's exact step."""
    parts = [
        "| data | | live | ms | × mm | exact, ms | error of dE | of dC | dense dE | dense dC |",
        "|---|---|" + "--:|" * 8,
    ]
    steps = {(row["data"], row["name"], row["mode"]): row for row in rows if row.get("pass") == STEP}
    for (data, name, mode), row in steps.items():
        if mode == "filtered" and "live" in row:
            exact = steps.get((data, name, "exact"), {})
            ms, mm, of_exact = (_cell(*what) for what in ((row, "time_ms"), (row, "mm"), (exact, "time_ms")))
            errors = (f"{row[key]:.1e}" for key in ("error_de", "error_dc", "dense_de", "dense_dc"))
            cells = [data, label(row), f"{row['live']:.0%}", ms or row["status"], mm, of_exact, *errors]
            parts.append("| " + " | ".join(cells) + " |")
    return [*parts, ""]


def _cell(row: Row, name: str) -> str:
    if name not in row:
        return ""
    return f"{row[name]:.2f}" if name == "mm" else f"{row[name]:.4g}"
