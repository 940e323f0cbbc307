"""``cce info``: versions, devices, and the backends that can run here."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch

import cce
from cce.cli.arguments import available_devices, explain_training
from cce.cli.errors import UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

#: Distributions that may provide a package; the first one installed is shown.
OPTIONAL = {
    "triton": ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "numba": ("numba",),
    "numba-cuda": ("numba-cuda",),
    "transformers": ("transformers",),
}

#: This package is distributed as cce-kernels. The package index also has a distribution of this name, for time series,
#: whose import name is ours: each of the two overwrites files of the other.
OTHER = "cce"
REMEDY = f"python -m pip uninstall {OTHER} cce-kernels, then install cce-kernels again"


class Section(NamedTuple):
    """Titled list of (name, value) rows."""

    title: str
    rows: list[tuple[str, str]]


def add_parser(commands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the command."""
    text = "Versions, devices, and every backend with the reasons why it cannot run here."
    commands.add_parser("info", help=text[0].lower() + text[1:-1], description=text).set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the sections, as tables if ``rich`` is installed."""
    if not hasattr(cce, "list_backends"):  # a later installation of the other distribution has replaced cce/__init__.py
        place = Path(cce.__file__).parent
        raise UsageError(f"the package imported as cce from {place} is not cce-kernels; {other() or REMEDY}")
    sections = [versions(), devices(), *(backends(torch.device(name)) for name in available_devices())]
    if find_spec("rich") is None:
        print("\n\n".join(map(plain, sections)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for section in sections:
        table = Table(title=section.title, title_justify="left", show_header=False, width=console.width)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(ratio=1)
        for name, value in section.rows:
            table.add_row(name, Text(value))  # Text: a reason may hold square brackets, which are not markup
        console.print(table)


def plain(section: Section) -> str:
    """Format a section as text without any library.

    >>> print(plain(Section("Devices", [("cpu", "2 threads"), ("cuda:0", "H100")])))
    Devices
      cpu     2 threads
      cuda:0  H100
    """
    width = max(len(name) for name, _ in section.rows)
    lines = [f"  {name:{width}}  " + value.replace("\n", "\n" + " " * (width + 4)) for name, value in section.rows]
    return "\n".join([section.title, *lines])


def versions() -> Section:
    """Versions of Python and of packages; none of the optional ones is imported."""
    rows = [("cce", f"{cce.__version__}, imported from {Path(cce.__file__).parent}")]
    if found := other():
        rows.append(("warning", found))
    rows.append(("python", f"{platform.python_version()} on {platform.platform()}"))
    rows += [("torch", torch.__version__), ("numpy", numpy.__version__)]
    rows += [(name, _first_version(names)) for name, names in OPTIONAL.items()]
    return Section("Versions", rows)


def other() -> str:
    """A warning with the remedy if the other distribution of the same import name is installed; "" if it is not."""
    try:
        place = distribution(OTHER).locate_file("")
    except PackageNotFoundError:
        return ""
    text = f"the distribution {OTHER!r}, {_first_version((OTHER,))}, in {place} has the same import name as cce-kernels"
    return f"{text}, and the two cannot be installed side by side; {REMEDY}"


def devices() -> Section:
    """The CPU and every accelerator PyTorch can use."""
    rows = [("cpu", f"{torch.get_num_threads()} threads of {os.cpu_count()} cores")]
    accelerator = available_devices()[0]
    count = torch.accelerator.device_count() if accelerator != "cpu" else 0
    for i in range(count):
        try:
            text = _accelerator(accelerator, i)
        except RuntimeError as error:
            text = f"does not work: {error}"
        rows.append((f"{accelerator}:{i}", text))
    return Section("Devices", rows)


def backends(device: torch.device) -> Section:
    """Every backend on ``device``, for the dtype in which models are trained there."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    title = f"Backends on {device}, {str(dtype).removeprefix('torch.')}"
    try:
        found = explain_training(device, dtype)
    except RuntimeError as error:  # an accelerator that is listed but does not work
        return Section(title, [("auto", f"nothing can run: {error}")])
    rows = [(name, "can run" if not reasons else "\n".join(reasons)) for name, reasons in found.reasons.items()]
    rows.append(("auto", f"runs {found.backend}" if found.backend else "no backend can run"))
    return Section(title, rows)


def _first_version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return version(name) or "of an unknown version"  # where its metadata are damaged
        except PackageNotFoundError:
            continue
    return "not installed"


def _accelerator(kind: str, index: int) -> str:
    if kind == "cuda":
        found = torch.cuda.get_device_properties(index)
        return f"{found.name}, capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"
    if kind == "xpu":
        return f"{torch.xpu.get_device_name(index)}"
    return "available"
