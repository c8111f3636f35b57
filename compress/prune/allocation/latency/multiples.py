"""Which multiples of channels an engine likes."""

from __future__ import annotations

from compress.errors import RecipeError
from compress.measure.machine import cpu_flags
from compress.runtime.engines import ENGINES

__all__ = ["preferred_multiple", "step_width"]


def step_width(engine: str) -> int:
    """Return the number of channels by which the time of a convolution rises in steps, 1 where it rises smoothly.

    ONNX Runtime keeps channels in blocks of 16 with AVX-512 and of 8 without (microsoft/onnxruntime#7442). Measured
    with 1.32 on an AMD EPYC with AVX-512, one thread, one interleaved run: a 3x3 convolution of 64 channels to 48, 52,
    56, 60 and 64 at 14x14 takes 99, 130, 130, 129 and 130 us; its input channels and depthwise convolutions go by the
    same steps, and so do the outputs of int8 ones (35, 43, 43, 43 and 43 us). Torch's kernels rise smoothly there
    (2.13: 135, 155, 175, 194 and 217 us from 48 channels to 48 up to 64 to 64).

    Args:
        engine: A key of ``compress.runtime.engines.ENGINES``.

    Raises:
        RecipeError: when there is no such engine.
    """
    if engine not in ENGINES:
        raise RecipeError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}. Choose one.")
    if engine != "onnxruntime":
        return 1
    return 16 if "avx512f" in cpu_flags() else 8


def preferred_multiple(engine: str) -> int:
    """Return the multiple to which widths should be rounded for an engine.

    For ONNX Runtime these are its steps. Compiled code of Inductor calls oneDNN, whose blocks are as wide as a vector
    register: with AVX-512 it rises at every width but is fastest for its work at multiples of 16 (four 3x3 convolutions
    at 14x14 with 48, 56, 64, 72 and 80 channels, one thread, one interleaved run: 500, 735, 789, 1055 and 1155 us).

    Args:
        engine: A key of ``compress.runtime.engines.ENGINES``.

    Raises:
        RecipeError: when there is no such engine.

    Example:
        >>> preferred_multiple("eager")
        8
    """
    if engine == "aoti" and "avx512f" in cpu_flags():
        return 16
    return max(8, step_width(engine))
