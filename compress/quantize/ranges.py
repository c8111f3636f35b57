"""Which range of a tensor's values integers stand for: pure functions of what has been seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import RecipeError

__all__ = ["RANGES", "Grid", "Seen", "around_zero", "choose_range"]

_NUM_BINS = 2048
_NUM_CANDIDATES = 128


@dataclass(frozen=True)
class Grid:
    """The integers that a range is spread over.

    Args:
        quant_min: The least.
        quant_max: The largest.
        symmetric: Whether zero lies in the middle.
    """

    quant_min: int = 0
    quant_max: int = 255
    symmetric: bool = False

    def round(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return values as they come back from integers, for ranges that broadcast with them.

        Example:
            >>> Grid(0, 4).round(torch.tensor([-0.6, 0.4, 0.6, 9.0]), torch.tensor(0.0), torch.tensor(4.0)).tolist()
            [0.0, 0.0, 1.0, 4.0]
        """
        steps = self.quant_max - self.quant_min
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / steps).clamp(min=torch.finfo(torch.float64).tiny)
        zero = (self.quant_min + self.quant_max) // 2 if self.symmetric else self.quant_min - (low / scale).round()
        return ((values / scale + zero).round().clamp(self.quant_min, self.quant_max) - zero) * scale


class Seen:
    """The values that passed one place of a network: their extremes batch by batch, and a histogram of all."""

    def __init__(self) -> None:
        self.lows: list[float] = []
        self.highs: list[float] = []
        self.counts = torch.zeros(_NUM_BINS, dtype=torch.float64)
        self._low = self._high = 0.0

    @property
    def low(self) -> float:
        """The least value."""
        return min(self.lows)

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.highs)

    @property
    def centres(self) -> Tensor:
        """The middle of each bin."""
        width = (self._high - self._low) / _NUM_BINS
        return self._low + width * (torch.arange(_NUM_BINS, dtype=torch.float64) + 0.5)

    def add(self, values: Tensor) -> None:
        """Take note of a batch.

        Args:
            values: Any shape; an empty tensor changes nothing.

        Raises:
            ValueError: when a value is not finite.
        """
        if not values.numel():
            return
        values = values.detach().float().flatten()
        low, high = (float(extreme) for extreme in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("not finite")
        self.lows.append(low)
        self.highs.append(high)
        self._widen(min(low, 0.0), max(high, 0.0))
        self.counts += torch.histc(values, _NUM_BINS, self._low, self._high).cpu()

    def _widen(self, low: float, high: float) -> None:
        """Move what has been counted into wider bins, where the new extremes lie outside."""
        low, high = min(low, self._low), max(high, self._high)
        if high == low:
            high = low + 1e-12  # zeros alone
        if (low, high) == (self._low, self._high):
            return
        if self.counts.any():
            which = ((self.centres - low) / (high - low) * _NUM_BINS).long().clamp(0, _NUM_BINS - 1)
            self.counts = torch.zeros_like(self.counts).index_add(0, which, self.counts)
        self._low, self._high = low, high


Range = tuple[float, float]


def _extremes(seen: Seen, grid: Grid, percentile: float) -> Range:
    return seen.low, seen.high


def _average(seen: Seen, grid: Grid, percentile: float) -> Range:
    """The mean of each batch's extremes, to which a moving average tends."""
    return sum(seen.lows) / len(seen.lows), sum(seen.highs) / len(seen.highs)


def _percentile(seen: Seen, grid: Grid, percentile: float) -> Range:
    """Leave out as many values as the percentile says, half of them at each end."""
    below = seen.counts.cumsum(0) / seen.counts.sum()
    outside = (1 - percentile / 100) / 2
    first = int((below > outside).nonzero()[0])
    last = int((below >= 1 - outside - 1e-12).nonzero()[0])
    return max(seen.low, float(seen.centres[first])), min(seen.high, float(seen.centres[last]))


def _least_squares(seen: Seen, grid: Grid, percentile: float) -> Range:
    """Of narrowed ranges the one whose rounding and clipping cost least, by squared error over the histogram."""
    fractions = torch.linspace(1 / _NUM_CANDIDATES, 1, _NUM_CANDIDATES, dtype=torch.float64)[:, None]
    back = grid.round(seen.centres, seen.low * fractions, seen.high * fractions)
    errors = ((back - seen.centres) ** 2 * seen.counts).sum(1)
    best = float(fractions[int(errors.argmin())])
    return seen.low * best, seen.high * best


def _entropy(seen: Seen, grid: Grid, percentile: float) -> Range:
    """The clipping at which what is left of the distribution of magnitudes diverges least (Migacz, GTC 2017, S7310)."""
    largest = max(-seen.low, seen.high)
    magnitudes = torch.zeros(_NUM_BINS, dtype=torch.float64)
    which = (seen.centres.abs() / max(largest, 1e-12) * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
    magnitudes.index_add_(0, which, seen.counts)
    one_sided = seen.low >= 0 and not grid.symmetric
    levels = (grid.quant_max - grid.quant_min) // (1 if one_sided else 2)
    best, limit = math.inf, largest
    for num in [*range(levels + 1, _NUM_BINS, max(1, (_NUM_BINS - levels) // _NUM_CANDIDATES)), _NUM_BINS]:
        divergence = _divergence(magnitudes, num, levels)
        if divergence < best:
            best, limit = divergence, largest * num / _NUM_BINS
    return max(seen.low, -limit), min(seen.high, limit)


def _divergence(magnitudes: Tensor, num: int, levels: int) -> float:
    """Return the divergence of a clipped histogram from the same with so many levels only."""
    wanted = magnitudes[:num].clone()
    kept = wanted.clone()
    wanted[-1] += magnitudes[num:].sum()
    cell = (torch.arange(num) * levels // num).long()
    filled = (wanted > 0).double()
    totals = torch.zeros(levels, dtype=torch.float64).index_add(0, cell, kept)
    sizes = torch.zeros(levels, dtype=torch.float64).index_add(0, cell, filled)
    spread = (totals / sizes.clamp(min=1))[cell] * filled
    p, q = wanted / wanted.sum(), spread / spread.sum().clamp(min=1e-30)
    there = p > 0
    return float((p[there] * (p[there] / q[there].clamp(min=1e-12)).log()).sum())


RANGES: dict[str, Callable[[Seen, Grid, float], Range]] = {
    "minmax": _extremes,
    "average": _average,
    "percentile": _percentile,
    "mse": _least_squares,
    "entropy": _entropy,
}


def choose_range(method: str, seen: Seen, grid: Grid, *, percentile: float = 99.99) -> Range:
    """Return the range that integers stand for; it always holds zero, which padding needs exactly.

    Args:
        method: A key of ``RANGES``.
        seen: Values.
        grid: The integers.
        percentile: How many of the values lie inside, for that method.

    Raises:
        RecipeError: when there is no such method, or nothing has been seen.

    Example:
        >>> seen = Seen()
        >>> seen.add(torch.tensor([0.5, 2.0]))
        >>> choose_range("minmax", seen, Grid())
        (0.0, 2.0)
    """
    if method not in RANGES:
        raise RecipeError(f"quantize.ranges: expected one of {', '.join(RANGES)}, got {method!r}. Choose one.")
    if not seen.lows:
        raise RecipeError("calibrate: expected values to learn ranges from, got none. Give at least one batch.")
    low, high = RANGES[method](seen, grid, percentile)
    return min(low, 0.0), max(high, 0.0)


def around_zero(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Widen ranges that lie on one side of zero to the other, so that a symmetric quantizer keeps zero in the middle.

    PyTorch's kernel gives a zero point to what has one sign alone, as a row of a few weights may have, and engines take
    none for weights. The larger side, from which a scale follows, stays.

    Example:
        >>> around_zero(torch.tensor([1.0, -1.0, -2.0]), torch.tensor([2.0, 1.0, -1.0]))
        (tensor([-2., -1., -2.]), tensor([2.0000, 1.0000, 1.9800]))
    """
    return torch.where(low >= 0, -high, low), torch.where(high <= 0, -0.99 * low, high)
