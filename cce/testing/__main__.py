"""``python -m cce.testing --backend NAME --out FILE``: checks a backend and writes the record of it.

``--options-table`` prints the page docs/options.md instead.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys

from cce.testing.options_table import options_page
from cce.testing.report import GROUPS, check_backend


def main() -> int:
    """Runs the kit; exit status 1 if the backend fails it."""
    parser = argparse.ArgumentParser(prog="python -m cce.testing", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--backend")
    what.add_argument("--options-table", action="store_true", help="print docs/options.md")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument("--groups", default=",".join(GROUPS), help="what to check (%(default)s)")
    parser.add_argument("--short", action="store_true", help="fewer checks, for an interpreter")
    parser.add_argument("--out", help="JSON file for the record")
    parser.add_argument("--commit", default=None, help="commit to record (the checkout's, if it is one)")
    options = parser.parse_args()
    if options.options_table:
        print(options_page(), end="")
        return 0
    groups = options.groups.split(",")
    report = check_backend(options.backend, options.device, groups=groups, jobs=options.jobs, short=options.short)
    print(report)
    if options.out:
        today = datetime.date.today().isoformat()
        report.write(options.out, date=today, commit=options.commit or _commit())
    return 0 if report.passed else 1


def _commit() -> str | None:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
