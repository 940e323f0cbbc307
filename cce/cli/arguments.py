"""Values of options shared by several commands, parsed and checked before any work starts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import cce
from cce.cli.errors import UsageError


def whole_number(minimum: int, maximum: int = 2**63 - 1) -> Callable[[str], int]:
    """Make a parser of whole numbers in [minimum, maximum], for ``type=`` of an argparse option."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            upper = f" and at most {maximum}" if maximum < 2**63 - 1 else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least {minimum}{upper}")
        return value

    return parse


def available_devices() -> list[str]:
    """Device types of this machine that PyTorch can use, the fastest first.

    >>> "cpu" in available_devices()
    True
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [*([accelerator.type] if accelerator else []), "cpu"]


def usable_device(text: str) -> torch.device:
    """Return the device called ``text``, after making a tensor on it.

    Raises:
        UsageError: there is no such device, or it does not work.
    """
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        expected = ", ".join(available_devices())
        raise UsageError(f"--device: got {text!r}, expected one that works here: {expected}") from error
    return device


def able_backend(name: str, device: torch.device, dtypes: list[torch.dtype], spec: cce.Spec) -> str:
    """Return ``name`` after checking that the backend can train on ``device`` with inputs of each of ``dtypes``.

    Raises:
        UsageError: there is no such backend, or it cannot; the message gives its reasons.
    """
    names = ["auto", *cce.list_backends()]
    if name not in names:
        raise UsageError(f"--backend: got {name!r}, expected one of {', '.join(names)}")
    for dtype in dtypes:
        found = explain_training(device, dtype, name, spec)
        if found.backend is None:
            candidates = found.reasons if name == "auto" else {name: found.reasons[name]}
            # split and join: a reason may be another package's ImportError of several lines.
            why = "; ".join(" ".join(reason.split()) for reasons in candidates.values() for reason in reasons)
            able = [other for other, reasons in found.reasons.items() if not reasons]
            raise UsageError(
                f"--backend: got {name!r}, which cannot run {dtype} on {device} ({why}); "
                f"expected one that can: {', '.join(able) or 'none here'}"
            )
    return name


def explain_training(
    device: torch.device, dtype: torch.dtype, backend: str = "auto", spec: cce.Spec | None = None
) -> cce.Explanation:
    """Call ``cce.explain`` for a small training step with both gradients and sizes that every backend can tile."""
    e = torch.zeros(16, 64, dtype=dtype, device=device, requires_grad=True)
    c = torch.zeros(256, 64, dtype=dtype, device=device, requires_grad=True)
    targets = torch.zeros(16, dtype=torch.int64, device=device)
    return cce.explain(e, c, targets, backend=backend, spec=spec)


def writable_file(option: str, text: str, suffixes: tuple[str, ...]) -> Path:
    """Return the path ``text`` after checking that a file can be written there.

    Raises:
        UsageError: its suffix is not one of ``suffixes``, or it cannot be written.
    """
    path = Path(text).expanduser()
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{option}: got {text!r}, expected a file name that ends in {' or '.join(suffixes)}")
    existed = path.exists()
    try:
        path.open("ab").close()  # the only sure test: permission bits mean nothing for root or on read-only disks
    except OSError as error:
        raise UsageError(f"{option}: got {text!r}, expected a file that can be written ({error.strerror})") from error
    if not existed:
        path.unlink()
    return path
