"""Tuned launch configurations on disk: a folder with one JSON file for each problem on each kind of GPU.

With a file for each problem, processes that tune different ones do not undo each other's work. A process reads all
files once, at first use. Unlike other caches' files, these are also meant for people: JSON, with its digest as a field.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cce import files
from cce.backends.gpu.folders import folder_of
from cce.backends.gpu.sizes import power_of_two
from cce.backends.problem import Problem
from cce.backends.triton.launch import TILES, Device, Tile
from cce.spec import Spec
from cce.version import __version__

FORMAT = "cce launch configuration 2"
_FORMER = ("cce launch configuration 1",)  # from releases whose results would not be used anyway
_CACHE = "launch configurations"
VARIABLE = "CCE_TUNE_CACHE"


def folder() -> Path | None:
    """Folder from ``CCE_TUNE_CACHE``, else ``cce/launch`` in the user's cache folder; None if the variable is "off"."""
    return folder_of(VARIABLE, "launch")


def key_of(problem: Problem, spec: Spec, device: Device, ordered: bool) -> str:
    """Key of the problems a tuned configuration applies to: a JSON object, as text.

    N is rounded up to a power of two, since it differs from batch to batch; V and D are fixed by a model. The spec's
    fields are those that change what a kernel does, not how often it runs.
    """
    filtered = spec.filter != "none"
    return _canonical(
        {
            "gpu": device.name,
            "capability": list(device.capability),
            "multiprocessors": device.programs,
            **versions(),
            "n": power_of_two(problem.n),
            "v": problem.v,
            "d": problem.d,
            "k": problem.k,
            "e": str(problem.e_dtype).removeprefix("torch."),
            "c": str(problem.c_dtype).removeprefix("torch."),
            "precision": device.precision if problem.dtype == torch.float32 else None,
            "bias": problem.bias,
            "softcap": problem.softcap is not None,
            "logit_scale": problem.logit_scale != 1.0,
            "outputs": sorted(problem.outputs),
            "gradients": [name for name in ("e", "c", "bias") if getattr(problem, f"grad_{name}")],
            "filter": spec.filter,
            "lse_accumulation": spec.lse_accumulation,
            "scratch_bytes": spec.scratch_bytes,
            "block_n": spec.block_n if filtered else None,
            "block_v": spec.block_v if filtered else None,
            "ordered": ordered and filtered,
        }
    )


@lru_cache
def versions() -> dict[str, str | None]:
    """Versions of everything that makes the kernels: another release may make different or better ones."""
    import triton

    return {"cce": __version__, "triton": triton.__version__, "cuda": torch.version.cuda}


@lru_cache
def entries(where: Path | None) -> dict[str, dict[str, Tile]]:
    """All tuned tiles by key. A file of another format is ignored with a warning, so that training goes on."""
    found = {}
    for path in _files(where):
        try:
            content = json.loads(files.read(path).decode())
            if isinstance(content, dict) and content.get("format") in _FORMER:
                continue
            key, tiles = _read(content)
        except FileNotFoundError:  # deleted since
            continue
        except OSError as error:
            _warn(f"{path} cannot be read ({files.reason(error)}), and is ignored")
        except (files.Unusable, ValueError, TypeError, KeyError, RecursionError) as error:
            _warn(f"{path} is not a launch configuration ({files.reason(error)}), and is ignored")
        else:
            found[key] = tiles
    return found


def _files(where: Path | None) -> list[Path]:
    if where is None:
        return []
    try:
        return sorted(path for path in where.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return []
    except OSError as error:
        _warn(f"{where} cannot be read ({files.reason(error)}): no tuned launch configuration is used")
        return []


def _read(content: Any) -> tuple[str, dict[str, Tile]]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected an object whose format is {FORMAT!r}")
    if content.get("digest") != _digest(content):
        raise files.Unusable("it was changed: its digest is not that of its content")
    key, tiles = content["key"], content["tiles"]
    if not isinstance(key, dict) or not isinstance(tiles, dict) or not tiles or not set(tiles) <= set(TILES):
        raise ValueError(f"expected a key, and tiles out of {', '.join(TILES)}")
    return _canonical(key), {name: Tile(**fields) for name, fields in tiles.items()}


def _digest(content: Mapping[str, Any]) -> str:
    """Digest of all fields but its own."""
    text = _canonical({name: value for name, value in content.items() if name != "digest"})
    return hashlib.sha256(text.encode()).hexdigest()


def store(where: Path, key: str, tiles: Mapping[str, Tile], notes: Mapping[str, Any]) -> Path:
    """Write the file of ``key``, replacing an existing one; ``notes`` are for people, and are not read back.

    Raises:
        ValueError: the file cannot be written; nothing is then left behind.
    """
    content = {
        "format": FORMAT,
        "key": json.loads(key),
        "tiles": {name: asdict(tile) for name, tile in tiles.items()},
        "notes": json.loads(json.dumps(dict(notes))),  # as they will be read back: names in the same order
    }
    content["digest"] = _digest(content)
    path = where / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        files.write(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise _not_writable(where, error) from error
    return path


def writable() -> Path:
    """Return the folder, made if need be, after checking that files can be written there.

    Raises:
        ValueError: the cache is switched off, or the folder cannot be written to.
    """
    where = folder()
    if where is None:
        raise ValueError(f"{VARIABLE}: got {os.environ.get(VARIABLE)!r}, expected a folder to keep the result in")
    try:
        files.check_writable(where)
    except (OSError, files.Unusable) as error:
        raise _not_writable(where, error) from error
    return where


def _not_writable(where: Path, error: Exception) -> ValueError:
    why = files.reason(error)
    return ValueError(f"{VARIABLE}: got {str(where)!r}, expected a folder to write to ({why})")


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _warn(message: str) -> None:
    files.warn_once(_CACHE, message)
