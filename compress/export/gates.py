"""What a target must pass before it becomes part of an artefact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compress.export.parity import Parity
from compress.export.targets import Census

__all__ = ["FLOAT_TOLERANCE", "Gates", "failures", "few_integers"]


FLOAT_TOLERANCE = 1e-4  # relative; without quantization only the order of sums differs


@dataclass(frozen=True)
class Gates:
    """Limits for each target.

    Args:
        max_relative_error: Largest distance of each output from the trained module's, relative to its norm; at most
            ``FLOAT_TOLERANCE`` counts when nothing is quantised or in half precision.
        min_top1_agreement: Least fraction of held-out inputs with the same largest output; of several outputs, in the
            one called ``logits``, else in the first.
        min_int8_fraction: Least fraction of the multiply-accumulates that a compiled graph is certain to do in int8,
            when quantised.
    """

    max_relative_error: float = 0.1
    min_top1_agreement: float = 0.98
    min_int8_fraction: float = 0.5


def failures(
    engine: str, gates: Gates, census: Census | None, parity: Parity, *, quantized: bool, exact: bool = True
) -> Iterable[str]:
    """Yield what a target fails, in words.

    Args:
        engine: Name of the target.
        gates: The limits.
        census: Kernel counts, where the engine compiles.
        parity: Distance from the trained module.
        quantized: Whether int8 kernels are expected.
        exact: Whether no floats are in half precision, neither the network's nor the target's.
    """
    batches = parity.batches
    limit, name = gates.max_relative_error, "export.max_relative_error"
    if exact and not quantized and limit > FLOAT_TOLERANCE:
        limit, name = FLOAT_TOLERANCE, f"in float32 whatever {name} allows"
    for output, each in (parity.outputs or {"": parity}).items():
        of = f" in {output!r}" if output else ""
        others = [(found, f", {where}") for where, found in each.others.items()]
        for found, where in ((each.batches, ""), (each.singles, ", one by one"), *others):
            # Written so that not-a-number fails.
            if not found.relative_error <= limit:
                yield (
                    f"{engine}: expected a relative error of at most {limit:g} ({name}), "
                    f"got {found.relative_error:.4g}{of} on {found.num_samples} held-out inputs{where}."
                )
    if not batches.top1_agreement >= gates.min_top1_agreement:
        yield (
            f"{engine}: expected a top-1 agreement of at least {gates.min_top1_agreement:g} "
            f"(export.min_top1_agreement), got {batches.top1_agreement:.4g} on {batches.num_samples} held-out inputs."
        )
    if quantized and census is not None and (reason := few_integers(engine, gates, census)):
        yield reason


def few_integers(engine: str, gates: Gates, census: Census) -> str | None:
    """Return what a target lacks in int8, in words; ``None`` where it has enough."""
    if census.int8_fraction >= gates.min_int8_fraction:
        return None
    return (
        f"{engine}: expected at least {gates.min_int8_fraction:g} of the multiply-accumulates in int8 "
        f"(export.min_int8_fraction), got {census.int8_fraction:.3g} in {census.int8_kernels} of "
        f"{census.int8_kernels + census.float_kernels} kernels: the rest would run in floating point."
    )
