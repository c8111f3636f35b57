"""Integers instead of floats: schemes, PT2E preparation and conversion, calibration, quantization in a fit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress.quantize.calibrate import calibrate
from compress.quantize.coverage import Coverage, coverage
from compress.quantize.improve import IMPROVEMENTS, improve_network, improve_prepared, rehearse_improvements
from compress.quantize.layers import Assignment, make_assignment
from compress.quantize.parametrize import make_permanent, parametrize, rounded_layers
from compress.quantize.pt2e import convert, deployed_form, prepare, replay_quantize
from compress.quantize.ranges import RANGES
from compress.quantize.schemes import SCHEMES, Scheme, get_scheme, register

if TYPE_CHECKING:
    from compress.quantize.callback import QuantizationAwareTraining
    from compress.quantize.training.progressive import Stages

__all__ = [
    "IMPROVEMENTS",
    "RANGES",
    "SCHEMES",
    "Assignment",
    "Coverage",
    "QuantizationAwareTraining",
    "Scheme",
    "Stages",
    "calibrate",
    "convert",
    "coverage",
    "deployed_form",
    "get_scheme",
    "improve_network",
    "improve_prepared",
    "make_assignment",
    "make_permanent",
    "parametrize",
    "prepare",
    "register",
    "rehearse_improvements",
    "replay_quantize",
    "rounded_layers",
]

_LAZY = {
    "QuantizationAwareTraining": "compress.quantize.callback",
    "Stages": "compress.quantize.training.progressive",
}


def __getattr__(name: str) -> Any:
    # Lazily: a pruned network is rebuilt without Lightning.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
