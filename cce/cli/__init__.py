"""The command line: ``python -m cce`` and the console script ``cce``.

A command is one module with ``add_parser(commands)``, which adds its options and sets ``run``, the function that takes
the parsed arguments. Modules stay cheap to import: packages a command needs besides torch are imported by its ``run``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from cce.cli import bench, demo, info, tune
from cce.cli.errors import UsageError

COMMANDS = (info, demo, bench, tune)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line, like our other errors, without the usage argparse would print above it.
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by ``argv`` (default: the process's arguments) and return the exit code."""
    parser = _Parser(prog="cce", description="Cross-entropy of large-vocabulary language models without the logits.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UsageError as error:
        print(f"cce {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
