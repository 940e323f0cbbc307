"""``cce demo``: train a small language model twice, with the ordinary loss and with ``cce``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import cce
from cce.cli.arguments import able_backend, usable_device, whole_number, writable_file
from cce.cli.errors import UsageError, require

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

PACKAGES = ("tokenizers", "rich", "matplotlib", "platformdirs")


def add_parser(commands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the command and its options."""
    text = "Train a small language model with the ordinary cross-entropy and with cce, and compare the two."
    parser = commands.add_parser("demo", help=text[0].lower() + text[1:-1], description=text)
    parser.add_argument(
        "--text",
        type=Path,
        metavar="PATH",
        help="file or folder of UTF-8 text (default: the Python standard library's sources)",
    )
    parser.add_argument("--steps", type=whole_number(1), default=100, help="training steps (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    parser.add_argument("--backend", default="auto", help="backend of cce, see cce info (default: %(default)s)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--exact", dest="filter", action="store_const", const="none", help="train cce without filter (the default)"
    )
    mode.add_argument(
        "--filtered",
        dest="filter",
        action="store_const",
        const="element",
        help="train cce with the filter",
    )
    parser.add_argument("--out", default="cce-demo.png", metavar="PNG", help="picture (default: %(default)s)")
    parser.add_argument(
        "--save",
        metavar="PATH",
        help="write held-out hidden states, head, targets and unigram counts to a .pt or .npz file",
    )
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check every option, then run the demo.

    Raises:
        UsageError: a package is missing, or an option cannot be used.
    """
    require("demo", *PACKAGES)
    # Import after the check, since these modules import the packages.
    from cce.demo.config import Options
    from cce.demo.run import demo, evaluated_dtypes
    from cce.demo.text import TextError

    device = usable_device(args.device)
    spec = cce.Spec(filter=args.filter)
    options = Options(
        text=args.text and args.text.expanduser(),
        steps=args.steps,
        device=device,
        backend=able_backend(args.backend, device, evaluated_dtypes(device), spec),
        spec=spec,
        out=writable_file("--out", args.out, (".png",)),
        save=args.save and writable_file("--save", args.save, (".pt", ".npz")),
        seed=args.seed,
    )
    try:
        demo(options)
    except TextError as error:
        raise UsageError(f"--text: {error}") from error
