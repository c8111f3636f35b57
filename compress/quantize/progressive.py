"""Bits that fall while a network trains: it meets coarse integers after it is used to fine ones.

Only what has fewer than 8 bits in the end takes part. The bits follow from progress alone, so a fit that resumes has
them without keeping any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import RecipeError
from compress.surgery import Captured

__all__ = ["Stages", "set_bits"]


@dataclass(frozen=True)
class Stages:
    """How many bits from when on (Zhuang et al. 2018, arXiv:1711.00205, section 3.2).

    Args:
        bits: Falling; the last are those of the scheme. What has more in the end than a stage says has its own.
        at: Progress in [0, 1] from which on each holds, rising; the first also holds before.

    Raises:
        RecipeError: when the two do not fit each other.

    Example:
        >>> stages = Stages(bits=[16, 8, 4], at=[0.5, 0.6, 0.75])
        >>> [stages.bits_at(progress) for progress in (0.1, 0.5, 0.7, 0.8)]
        [16, 16, 8, 4]
    """

    bits: Sequence[int]
    at: Sequence[float]

    def __post_init__(self) -> None:
        if not self.bits or len(self.bits) != len(self.at):
            raise RecipeError(
                f"quantize.progressive: expected as many bits as times, got {len(self.bits)} and {len(self.at)}. "
                "Write bits: [16, 8, 4] and at: [0.5, 0.6, 0.75], say."
            )
        if list(self.bits) != sorted(set(self.bits), reverse=True) or not 2 <= self.bits[-1] <= self.bits[0] <= 16:
            raise RecipeError(
                f"quantize.progressive.bits: expected falling numbers from 16 to 2, got {list(self.bits)}. "
                "Write [16, 8, 4], say."
            )
        if list(self.at) != sorted(set(self.at)) or not 0 <= self.at[0] <= self.at[-1] <= 1:
            raise RecipeError(
                f"quantize.progressive.at: expected rising values in [0, 1], got {list(self.at)}. "
                "Write [0.5, 0.6, 0.75], say."
            )

    def bits_at(self, progress: float) -> int:
        """Return the bits in force."""
        return [bits for bits, at in zip(self.bits, self.at) if at <= progress or at == self.at[0]][-1]


def set_bits(prepared: Captured, bits: int) -> None:
    """Let fake quantizers of few bits round to finer integers over the same range, or to their own again.

    Args:
        prepared: From ``prepare``.
        bits: As many or more than a fake quantizer has of its own; with fewer it keeps its own.
    """
    module: Any
    for module in prepared.graph_module.modules():
        if not hasattr(module, "fake_quant_enabled"):
            continue
        if "own_limits" not in module.__dict__:
            module.own_limits = int(module.quant_min), int(module.quant_max)
        limits = _limits(module.own_limits, bits)
        for holder in (module, getattr(module, "activation_post_process", module)):
            holder.quant_min, holder.quant_max = limits


def _limits(own: tuple[int, int], bits: int) -> tuple[int, int]:
    """Return the ends of a grid like another one, with more bits.

    Example:
        >>> _limits((-8, 7), 8), _limits((0, 14), 8), _limits((-128, 127), 16), _limits((-8, 7), 3)
        ((-128, 127), (0, 254), (-128, 127), (-8, 7))
    """
    low, high = own
    own_bits = (high - low).bit_length()
    if own_bits >= 8 or bits <= own_bits:
        return own
    if low < 0:
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - (1 << own_bits) + high
