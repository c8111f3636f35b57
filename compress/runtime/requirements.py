"""What a compiled file needs of a machine, written at export and checked at load."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from compress.measure.machine import cpu_flags, has_cuda

__all__ = ["cuda_requirements", "native_requirements", "why_not"]

# Flags that change which instructions a compiler emits for -march=native.
_INSTRUCTION_SETS = ("avx", "amx", "fma", "f16c", "bmi", "sse4", "gfni", "vaes", "vpclmul", "movbe", "adx")


def native_requirements() -> dict[str, Any]:
    """Return what code compiled natively on this machine needs to run elsewhere."""
    return {
        "system": platform.system(),
        "arch": platform.machine(),
        "flags": sorted(flag for flag in cpu_flags() if flag.startswith(_INSTRUCTION_SETS)),
        "torch": ".".join(metadata.version("torch").split(".")[:2]),
    }


def cuda_requirements() -> dict[str, Any]:
    """Return what code for this machine's GPU needs to run elsewhere: a GPU with the same compute capability, too."""
    return {**native_requirements(), "cuda": _compute_capability()}


def why_not(requires: Mapping[str, Any]) -> str | None:
    """Say why this machine cannot run a file, or ``None`` when it can.

    Example:
        >>> why_not({"arch": "pdp11"})
        'built for pdp11...'
    """
    here = {"system": platform.system(), "arch": platform.machine()}
    for key, value in here.items():
        if requires.get(key, value) != value:
            return f"built for {requires[key]}, this is {value}"
    if "cuda" in requires:
        if not has_cuda():
            return "there is no GPU that CUDA sees"
        found = _compute_capability() if find_spec("torch") else requires["cuda"]
        if found != requires["cuda"]:
            return f"built for compute capability {requires['cuda']}, this is {found}"
    flags = cpu_flags()
    missing = sorted(set(requires.get("flags", [])) - flags) if flags else []
    if missing:
        return f"this processor lacks {', '.join(missing[:6])}"
    if "build" in requires and find_spec("torch") and metadata.version("torch") != requires["build"]:
        return f"built with torch {requires['build']}, this is {metadata.version('torch')}"
    wanted = {**({"torch": requires["torch"]} if "torch" in requires else {}), **requires.get("versions", {})}
    for package, version in wanted.items():
        try:
            found = ".".join(metadata.version(package).split(".")[:2])
        except metadata.PackageNotFoundError:
            return f"{package} is not installed"
        if found != version:
            return f"built with {package} {version}, this is {found}"
    return None


def _compute_capability() -> str:
    import torch

    try:
        return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "none"
    except RuntimeError:  # a GPU that cannot be used
        return "none"
