"""Knowledge distillation and model compression on PyTorch Lightning: from a recipe to a checked, fast artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.distill import Classification, Distiller, SoftTarget, WarmupCosine
    from compress.errors import CompressError
    from compress.pipeline import create_run, open_run, run
    from compress.prune import StructuredPruning, WeightSparsity
    from compress.quantize import QuantizationAwareTraining
    from compress.recipe import Distill, Export, Recipe, Teacher
    from compress.runtime import CompactModel, load
    from compress.surgery import History, rebuild

__version__ = "0.1.0"

__all__ = [
    "Classification",
    "CompactModel",
    "CompressError",
    "Distill",
    "Distiller",
    "Export",
    "History",
    "QuantizationAwareTraining",
    "Recipe",
    "SoftTarget",
    "StructuredPruning",
    "Teacher",
    "WarmupCosine",
    "WeightSparsity",
    "create_run",
    "load",
    "open_run",
    "rebuild",
    "run",
]

_ROOMS = {
    "compress.distill": ["Classification", "Distiller", "SoftTarget", "WarmupCosine"],
    "compress.errors": ["CompressError"],
    "compress.pipeline": ["create_run", "open_run", "run"],
    "compress.prune": ["StructuredPruning", "WeightSparsity"],
    "compress.quantize": ["QuantizationAwareTraining"],
    "compress.recipe": ["Distill", "Export", "Recipe", "Teacher"],
    "compress.runtime": ["CompactModel", "load"],
    "compress.surgery": ["History", "rebuild"],
}


def __getattr__(name: str) -> Any:
    # Lazily: serving an artefact must not import Lightning.
    for room, names in _ROOMS.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(room), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
