"""Choice of a call's launch configuration: the one the user tuned for it, else the shipped one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache

import torch

from cce.backends.problem import Problem
from cce.backends.triton import tunecache
from cce.backends.triton.launch import Device, Launch, fitted, shipped
from cce.spec import Spec

_imposed: ContextVar[Launch | None] = ContextVar("launch", default=None)


@contextmanager
def launched_with(launch: Launch) -> Iterator[None]:
    """Context in which all calls of this thread use this configuration, whatever the problem; for trials."""
    token = _imposed.set(launch)
    try:
        yield
    finally:
        _imposed.reset(token)


def launch_of(problem: Problem, spec: Spec) -> Launch:
    """Configuration of a problem's kernels on the current device; ``spec`` is resolved."""
    launch = _imposed.get()
    if launch is not None:
        return launch
    ordered = spec.permutation is not None or spec.vocab_order == "mean_logit"
    if spec.permutation is not None:  # a cache would compare its values, and so wait for them
        spec = Spec.from_key(spec.key)
    return choose(problem, spec, gpu_of(current_device(problem.device)), ordered)


@lru_cache(maxsize=256)
def choose(problem: Problem, spec: Spec, device: Device, ordered: bool) -> Launch:
    """Choose the configuration for a problem on a device.

    Args:
        problem, spec: those of the call; ``spec`` is resolved.
        device: device that runs it.
        ordered: whether the vocabulary has its own order.
    """
    launch = shipped(problem, spec, device)
    entries = tunecache.entries(tunecache.folder())
    if not entries:  # nothing was ever tuned: skip making a key
        return launch
    tiles = entries.get(tunecache.key_of(problem, spec, device, ordered))
    if tiles is None:
        return launch
    tuned = launch.with_tiles(tiles)
    # One kernel computes both products, so tiles of dE take the number of warps of dC, whichever was tuned.
    tuned = replace(tuned, de=replace(tuned.de, warps=tuned.dc.warps), tuned=True)
    if fitted(tuned, problem, spec) != tuned:
        warnings.warn(
            f"cce: the tuned launch configuration {tiles} does not fit {spec}, the shipped one is used; "
            "tune again, or delete it (docs/tuning.md)",
            RuntimeWarning,
            stacklevel=2,
        )
        return launch
    return tuned


def forget() -> None:
    """Make the next call read the cache on disk again."""
    choose.cache_clear()
    tunecache.entries.cache_clear()


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the device; that of sm_90 in the interpreter."""
    return (9, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of the device; 2 in the interpreter, which runs programs one after the other."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def device_name(device: torch.device) -> str:
    """Name of the device's model."""
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)


def float32_precision() -> str:
    """Precision of float32 products, from torch.get_float32_matmul_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def gpu_of(device: torch.device) -> Device:
    """Properties of the device on which a configuration depends."""
    return Device(device_name(device), capability(device), multiprocessors(device), float32_precision())


def current_device(kind: str) -> torch.device:
    """Device of this type on which kernels are launched now."""
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", torch.cuda.current_device())
