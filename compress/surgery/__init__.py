"""Changes to a network's structure as data: recorded, replayed, and carried through a running Trainer.

Pruning and quantization both enter a fit by one door, ``ModelEditor.edit``: the change is planned on rank 0, written
into the ``History``, applied on every rank, and optimisers and DDP are re-linked once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress.surgery.capture import Captured, capture
from compress.surgery.history import Edit, History, replay
from compress.surgery.rebuild import rebuild
from compress.surgery.slicing import apply_slices
from compress.surgery.snapshot import load_snapshot, save_snapshot

if TYPE_CHECKING:
    from compress.surgery.editor import ModelEditor, history_of
    from compress.surgery.resume import RandomStates, ResumePoint
    from compress.surgery.timeline import progress

__all__ = [
    "Captured",
    "Edit",
    "History",
    "ModelEditor",
    "RandomStates",
    "ResumePoint",
    "apply_slices",
    "capture",
    "history_of",
    "load_snapshot",
    "progress",
    "rebuild",
    "replay",
    "save_snapshot",
]

_LAZY = {
    "ModelEditor": "compress.surgery.editor",
    "RandomStates": "compress.surgery.resume",
    "ResumePoint": "compress.surgery.resume",
    "history_of": "compress.surgery.editor",
    "progress": "compress.surgery.timeline",
}


def __getattr__(name: str) -> Any:
    # Lazily: a pruned network is rebuilt without Lightning.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
