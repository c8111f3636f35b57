"""Changes to a network's structure as data: recorded, replayed, and carried through a running Trainer.

Pruning and quantization both enter a fit by one door, ``ModelEditor.edit``: the change is planned on rank 0, written
into the ``History``, applied on every rank, and optimisers and DDP are re-linked once.
"""

from compress.surgery.capture import Captured, capture
from compress.surgery.editor import ModelEditor, history_of
from compress.surgery.history import Edit, History, replay
from compress.surgery.progress import progress
from compress.surgery.rebuild import rebuild
from compress.surgery.resume import RandomStates, ResumePoint
from compress.surgery.slicing import apply_slices
from compress.surgery.snapshot import load_snapshot, save_snapshot

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
