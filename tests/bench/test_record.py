"""``bench/record.sh``: all of its commands are of scripts that exist and have these options."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench/record.sh"
#: Where a module's options are.
SOURCES = {"cce bench": "cce/cli/bench.py", "cce.testing": "cce/testing/__main__.py"}


def run(parts: list[str], tmp_path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """With programs that only write down how they are called."""
    for name in ("python", "torchrun"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    given = {"PATH": path, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), "COMMIT": "abc"} | more
    return subprocess.run(["bash", str(SCRIPT), *parts], env=given, cwd=ROOT, capture_output=True, text=True)


def test_every_option_is_one_of_the_command(tmp_path: Path) -> None:
    assert run(["heads", "models", "split"], tmp_path).returncode == 0
    calls = [call.split() for call in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 3 + 1 + 3 + 5 + 2 + 1
    for call in calls:
        name = " ".join(word for word in call[1:3] if not word.startswith("-")) if call[0] == "-m" else ""
        source = ROOT / (SOURCES[name] if name else next(word for word in call if word.endswith(".py")))
        text = source.read_text("utf-8")
        for word in call:
            if word.startswith("--") and word != "--nproc-per-node":
                assert f'"{word}"' in text, f"{source} has no {word}"
    steps = (tmp_path / "out/steps.log").read_text().splitlines()
    assert len(steps) == len(calls) and all(" s, exit 0" in line for line in steps)
    outs = [call[call.index("--out") + 1] for call in calls]
    assert len(set(outs)) == len(outs)


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    failing.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *exact*) exit 3;; esac\n')
    failing.chmod(0o755)
    assert run(["heads"], tmp_path, PYTHON=str(failing)).returncode == 0
    steps = (tmp_path / "out/steps.log").read_text()
    assert steps.count("exit 3") == 1 and steps.count("exit 0") == 11


def test_a_part_ends_in_time(tmp_path: Path) -> None:
    sleeping = tmp_path / "sleeping"
    sleeping.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeping.chmod(0o755)
    assert run(["models"], tmp_path, PYTHON=str(sleeping), LIMIT="1").returncode == 0
    assert (tmp_path / "out/steps.log").read_text().count(" of 1 s, exit 124") == 2
    assert run(["models"], tmp_path, PYTHON=str(sleeping), LIMIT="0").returncode == 0
    assert (tmp_path / "out/steps.log").read_text().count(", 0 of 0 s, no time left") == 2


@pytest.mark.parametrize(
    ("parts", "more", "said"),
    [
        (["all"], {}, "got 'all', expected heads, models or split"),
        ([], {}, "heads, models or split"),
        (["heads"], {"OUT": ""}, "folder for the records"),
        (["heads"], {"COMMIT": ""}, "commit that the records name"),
    ],
)
def test_bad_calls(tmp_path: Path, parts: list[str], more: dict[str, str], said: str) -> None:
    done = run(parts, tmp_path, **more)
    assert done.returncode != 0 and said in done.stderr
    assert not (tmp_path / "calls").exists()
