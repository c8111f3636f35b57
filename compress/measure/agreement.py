"""How well two networks agree on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True)
class Agreement:
    """How far outputs are from a reference.

    Args:
        max_abs_error: Largest absolute difference.
        relative_error: Norm of the difference over the norm of the reference.
        top1_agreement: Fraction of samples whose largest output is the same one.
        num_samples: How many samples were compared.
    """

    max_abs_error: float
    relative_error: float
    top1_agreement: float
    num_samples: int


def agreement(reference: np.ndarray, outputs: np.ndarray) -> Agreement:
    """Compare outputs with a reference.

    Args:
        reference: Shape (N, ..., C).
        outputs: The same shape.

    Returns:
        The distances; not-a-number anywhere gives infinite errors.

    Example:
        >>> agreement(np.array([[1.0, 0.0]]), np.array([[0.5, 0.0]])).relative_error
        0.5
    """
    if reference.shape != outputs.shape:
        raise ValueError(f"agreement: expected outputs of shape {reference.shape}, got {outputs.shape}. Compare alike.")
    difference = np.abs(outputs.astype(np.float64) - reference)
    finite = bool(np.isfinite(difference).all())
    norm = float(np.linalg.norm(reference.astype(np.float64)))
    return Agreement(
        max_abs_error=float(difference.max()) if finite else float("inf"),
        relative_error=float(np.linalg.norm(difference)) / max(norm, 1e-30) if finite else float("inf"),
        top1_agreement=float((reference.argmax(-1) == outputs.argmax(-1)).mean()),
        num_samples=len(reference),
    )
