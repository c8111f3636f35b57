"""What a target must pass before it becomes part of an artefact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compress.export.targets import Census
from compress.measure.agreement import Agreement

__all__ = ["Gates", "failures"]


@dataclass(frozen=True)
class Gates:
    """Limits for each target.

    Args:
        max_relative_error: Largest distance of the outputs from the trained module's, relative to their norm.
        min_top1_agreement: Least fraction of held-out inputs with the same largest output.
        min_int8_fraction: Least fraction of int8 among the matrix kernels of a compiled graph, when quantised.
    """

    max_relative_error: float = 0.1
    min_top1_agreement: float = 0.98
    min_int8_fraction: float = 0.5


def failures(
    engine: str, gates: Gates, census: Census | None, agreement: Agreement, *, quantized: bool
) -> Iterable[str]:
    """Yield what a target fails, in words.

    Args:
        engine: Name of the target.
        gates: The limits.
        census: Kernel counts, where the engine compiles.
        agreement: Distance from the trained module.
        quantized: Whether int8 kernels are expected.
    """
    if not agreement.relative_error <= gates.max_relative_error:
        yield (
            f"{engine}: expected a relative error of at most {gates.max_relative_error:g} (export.max_relative_error), "
            f"got {agreement.relative_error:.4g} on {agreement.num_samples} held-out inputs."
        )
    if not agreement.top1_agreement >= gates.min_top1_agreement:
        yield (
            f"{engine}: expected a top-1 agreement of at least {gates.min_top1_agreement:g} (export.min_top1_agreement), "
            f"got {agreement.top1_agreement:.4g} on {agreement.num_samples} held-out inputs."
        )
    if quantized and census is not None and census.int8_fraction < gates.min_int8_fraction:
        yield (
            f"{engine}: expected at least {gates.min_int8_fraction:g} of the matrix kernels in int8 "
            f"(export.min_int8_fraction), got {census.int8_kernels} of {census.int8_kernels + census.float_kernels}: "
            "it would run in floating point."
        )
