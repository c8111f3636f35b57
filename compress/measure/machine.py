"""What the figures were measured on, and where this machine keeps them."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

__all__ = [
    "cpu_flags",
    "describe_machine",
    "gpus",
    "has_bf16",
    "has_cuda",
    "has_vnni",
    "most_threads",
    "user_cache",
    "versions",
]

_PACKAGES = ["torch", "pytorch-lightning", "torchao", "torch-pruning", "onnx", "numpy"]
_PACKAGES += ["onnxruntime", "onnxruntime-gpu", "openvino", "executorch", "apache-tvm", "ai-edge-litert"]


def describe_machine() -> dict[str, str | int]:
    """Return processor, cores, memory, system and the versions of what was used."""
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": _memory_gib(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **versions(),
    }


def most_threads() -> int:
    """Return how many threads one call may have: four for each processor, and 16 where there are few.

    Libraries start as many as they are told, at loading: thousands take seconds, and each its stack.
    """
    return max(16, 4 * (os.cpu_count() or 1))


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_flags() -> set[str]:
    """Return the processor's feature flags as Linux names them; empty where they cannot be read."""
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def has_vnni() -> bool:
    """Say whether sums of int8 products are exact: on x86 without VNNI, those of two products overflow 16 bits."""
    return platform.machine().lower() not in ("x86_64", "amd64") or bool(cpu_flags() & {"avx512_vnni", "avx_vnni"})


def has_bf16() -> bool:
    """Say whether the processor multiplies in bfloat16."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


@cache
def has_cuda() -> bool:
    """Say whether there is a driver for NVIDIA's GPUs, without importing torch, and no word that hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    try:
        ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return False
    return True


def gpus() -> list[str]:
    """Return the names of NVIDIA's GPUs as Linux has them, and what ``CUDA_VISIBLE_DEVICES`` says of them."""
    folder = Path("/proc/driver/nvidia/gpus")
    found = sorted(folder.glob("*/information")) if folder.is_dir() else []
    names = [line.partition(":")[2].strip() for file in found for line in file.read_text().splitlines()[:1]]
    return [*names, os.environ.get("CUDA_VISIBLE_DEVICES", "")]


def user_cache() -> Path | None:
    """Return the folder of what this machine has found out: ``$COMPRESS_CACHE`` or ``~/.cache/compress``.

    A user without a home has none: what is found out is lost then, or kept with what it was found out for.
    """
    if named := os.environ.get("COMPRESS_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "compress"
    except RuntimeError:
        return None


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _memory_gib() -> int:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return 0
