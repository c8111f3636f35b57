"""Serve an artefact with the fastest engine this machine has; torch is imported only where an engine needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.runtime.loading import load
    from compress.runtime.manifest import Manifest, Target, read_manifest
    from compress.runtime.model import CompactModel
    from compress.runtime.samples import read_samples

__all__ = ["CompactModel", "Manifest", "Target", "load", "read_manifest", "read_samples"]

_HOME = {
    "CompactModel": "compress.runtime.model",
    "Manifest": "compress.runtime.manifest",
    "Target": "compress.runtime.manifest",
    "load": "compress.runtime.loading",
    "read_manifest": "compress.runtime.manifest",
    "read_samples": "compress.runtime.samples",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
