"""Integers instead of floats: schemes, PT2E preparation and conversion, and quantization-aware training."""

from compress.quantize.callback import QuantizationAwareTraining
from compress.quantize.pt2e import convert, prepare, replay_quantize
from compress.quantize.schemes import SCHEMES, Scheme, get_scheme

__all__ = [
    "SCHEMES",
    "QuantizationAwareTraining",
    "Scheme",
    "convert",
    "get_scheme",
    "prepare",
    "replay_quantize",
]
