"""``cce bench``: time, memory and accuracy of every backend and of its peers on the heads of real models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import cce
from cce.cli.arguments import available_devices, usable_device, whole_number, writable_file
from cce.cli.errors import UsageError, require

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

    from cce.benchmarks.shapes import Shape
    from cce.benchmarks.studies import Options

PACKAGES = ("rich", "matplotlib")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_parser(commands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the command and its options."""
    text = "Time, memory and accuracy of every backend and of other libraries on the heads of real models."
    parser = commands.add_parser("bench", help=text[0].lower() + text[1:-1], description=text)
    every: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--quick", action="store_true", help="one head, two modes, fewer rounds: about two minutes")
    parser.add_argument("--device", help="cuda, cpu, ... (default: the fastest here)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help="MODEL:N or NxDxV, or all (default: three heads; two on a CPU)"
    )
    parser.add_argument("--studies", **every, help="heads, vocabulary, tokens, width, filter (default: heads)")
    parser.add_argument("--data", **every, help="random, synthetic, trained (default: those available)")
    parser.add_argument(
        "--trained",
        type=Path,
        nargs="+",
        metavar="PT",
        help="files from bench/train_lm.py or cce demo --save",
    )
    parser.add_argument("--backends", **every, help="default: all of cce.list_backends()")
    parser.add_argument("--modes", **every, help="exact, filtered, uncompensated (default: all; quick: two)")
    parser.add_argument("--passes", **every, help="forward, forward+backward (default: both)")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="other implementations (default: all; may be none)")
    parser.add_argument("--rounds", type=whole_number(1), help="turns of all candidates (default: 5; quick, sweeps 3)")
    parser.add_argument("--out", metavar="JSONL", help="file for the record, written as rows are measured")
    parser.add_argument("--plot", type=Path, metavar="JSONL", help="measure nothing: show this record, draw pictures")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="picture folder (default: the record's)")
    parser.add_argument("--png", action="store_true", help="pictures as PNG instead of SVG")
    parser.add_argument("--commit", help="commit to write into the record (default: that of the checkout)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check every option, then measure, or show a record.

    Raises:
        UsageError: a package is missing, or an option cannot be used.
    """
    require("bench", *PACKAGES)
    # Import after the check, since these modules import the packages.
    from cce.benchmarks import record, run

    if args.plot is not None:
        try:
            found = record.read(args.plot)
        except (OSError, ValueError) as error:
            raise UsageError(f"--plot: {error}") from error
    else:
        out = writable_file("--out", args.out, (".jsonl",)) if args.out else None
        found = run.measure(options(args), out, args.commit)
    path = args.plot or (Path(args.out) if args.out else None)
    folder = args.pictures or (path.parent if path else None)
    run.report(found, folder, path.stem if path else "bench", ".png" if args.png else ".svg")


def options(args: argparse.Namespace) -> Options:
    """Return the options of the measurement, with every name checked.

    Raises:
        UsageError: an option cannot be used.
    """
    from cce.benchmarks import shapes, studies
    from cce.benchmarks.candidates import MODES
    from cce.benchmarks.measure import PASSES, Effort
    from cce.benchmarks.peers import PEERS

    device = usable_device(args.device or available_devices()[0])
    kind = "cuda" if device.type == "cuda" else "cpu"
    default = shapes.QUICK[kind] if args.quick else shapes.GPU_SHAPES if kind == "cuda" else shapes.CPU_SHAPES
    rounds = args.rounds or (3 if args.quick else 5)
    span = (40 if args.quick else 100) if kind == "cuda" else 40
    trained = _trained(args.trained or [])
    usual = [*["random"] * (kind == "cuda" and not args.quick), "synthetic", *["trained"] * bool(trained)]
    data = _chosen("--data", args.data, studies.DATA, tuple(usual))
    if "trained" in data and not trained:
        raise UsageError("--data: got 'trained' without --trained PATH, expected the file, too")
    if trained and "trained" not in data:
        raise UsageError(f"--trained: got files, expected 'trained' among --data, which has {', '.join(data)}")
    return studies.Options(
        device=device,
        dtype=DTYPES[args.dtype or ("bfloat16" if kind == "cuda" else "float32")],
        shapes=tuple(_shapes(args.shapes or default)),
        studies=_chosen("--studies", args.studies, studies.STUDIES, ("heads",)),
        data=tuple(name for kind in data for name in (trained if kind == "trained" else [kind])),
        backends=_chosen("--backends", args.backends, tuple(cce.list_backends())),
        modes=_chosen("--modes", args.modes, tuple(MODES), tuple(MODES)[: 2 if args.quick else None]),
        passes=_chosen("--passes", args.passes, PASSES),
        peers=_chosen("--peers", args.peers, tuple(PEERS)),
        trained=trained,
        quick=args.quick,
        effort=Effort(rounds, span),
        sweep_effort=Effort(args.rounds or 3, min(span, 60)),
    )


def _chosen(
    option: str, names: list[str] | None, possible: tuple[str, ...], default: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """Return ``names``, all of which must be ``possible``; without any, the default."""
    if names is None:
        return possible if default is None else default
    for name in names:
        if name not in possible:
            raise UsageError(f"{option}: got {name!r}, expected some of {', '.join(possible)}")
    return tuple(dict.fromkeys(names))


def _shapes(names: Sequence[str]) -> list[Shape]:
    from cce.benchmarks import shapes

    if list(names) == ["all"]:
        return shapes.all_shapes()
    try:
        return [shapes.parse(name) for name in names]
    except ValueError as error:
        raise UsageError(f"--shapes: {error}") from error


def _trained(paths: list[Path]) -> dict[str, Path]:
    """Return the files of trained states, each with its own name."""
    from cce.benchmarks.studies import TRAINED

    named = {TRAINED + path.stem: _readable("--trained", path) for path in paths}  # "trained-base" of base.pt
    if len(named) < len(paths):
        raise UsageError(f"--trained: got {', '.join(map(str, paths))}, expected files of different names")
    return named


def _readable(option: str, path: Path) -> Path:
    try:
        path.open("rb").close()
    except OSError as error:
        raise UsageError(f"{option}: got {str(path)!r}, expected a file that can be read ({error.strerror})") from error
    return path
