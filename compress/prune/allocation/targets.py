"""What a pruned network may cost: one number in one currency."""

from __future__ import annotations

from dataclasses import dataclass

from compress.errors import RecipeError
from compress.measure.machine import most_threads
from compress.runtime.engines import ENGINES

__all__ = ["CURRENCIES", "Target"]

CURRENCIES = ("latency_ms", "latency", "macs", "params", "bytes")


@dataclass(frozen=True)
class Target:
    """What the network may cost after pruning; exactly one of the first five is given.

    Args:
        latency_ms: Milliseconds of one undisturbed call on ``engine`` of the float network: quantization comes later.
        latency: The same as a fraction of the original network's.
        macs: Multiply-accumulates of one sample; up to 1 a fraction of the original's.
        params: Parameters; up to 1 a fraction of the original's.
        bytes: Size of the weights in float32; up to 1 a fraction of the original's.
        engine: What latency is measured on, a key of ``compress.runtime.engines.ENGINES``.
        batch: Samples of that call.
        threads: Threads of that call; the engine's default without it.
        tolerance: How far below the target the result may stay without another look for a closer one, as a fraction.

    Raises:
        RecipeError: when a value is out of range.

    Example:
        >>> Target(macs=0.5).absolute(3000.0)
        1500.0
        >>> Target(latency_ms=0.5).absolute(3.0)
        0.5
    """

    latency_ms: float | None = None
    latency: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    engine: str = "onnxruntime"
    batch: int = 1
    threads: int | None = None
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        given = [name for name in CURRENCIES if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(
                f"prune.target: expected exactly one of {', '.join(CURRENCIES)}, got "
                f"{' and '.join(given) or 'none'}. Give one: another than the recipe's "
                "with --prune.target null --prune.target.macs 0.5."
            )
        if not 0 < self.value < float("inf"):
            raise RecipeError(f"prune.target.{self.currency}: expected a positive number, got {self.value}. Use 0.5.")
        if self.currency == "latency" and self.value > 1:
            raise RecipeError(
                f"prune.target.latency: expected a fraction in (0, 1], got {self.value}. "
                "Use prune.target.latency_ms for milliseconds."
            )
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"prune.target.{name}: expected at least 1, got {value}. Use 1.")
        if self.threads is not None and self.threads > most_threads():
            raise RecipeError(f"prune.target.threads: expected at most {most_threads()}, got {self.threads}. Use 1.")
        if not 0 < self.tolerance < 1:
            raise RecipeError(f"prune.target.tolerance: expected a value in (0, 1), got {self.tolerance}. Use 0.05.")
        if self.engine not in ENGINES:
            raise RecipeError(
                f"prune.target.engine: expected one of {', '.join(ENGINES)}, got {self.engine!r}. Choose one."
            )

    @property
    def currency(self) -> str:
        """The name of what is given."""
        return next(name for name in CURRENCIES if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """What is given."""
        return getattr(self, self.currency)

    def absolute(self, original: float) -> float:
        """Return the target as a cost.

        Args:
            original: What the network costs before any pruning.
        """
        # Half a millisecond is a latency that a small network has: never a fraction.
        return self.value * original if self.currency != "latency_ms" and self.value <= 1 else self.value
