"""Properties of a device on which launches depend; those of a made-up GPU in Triton's interpreter."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

from cce.backends.triton.launch import Device

INTERPRETED = triton.knobs.runtime.interpret


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
