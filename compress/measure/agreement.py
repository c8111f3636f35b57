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
        top1_agreement: Fraction of samples whose largest output is the same one; 1 where outputs are complex, of which
            none is the largest.
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
        The distances. An infinity that stands in both, as where a mask has ruled out a class, is no error and has no
        part in the norm; any other, and not-a-number anywhere, gives infinite errors.

    Example:
        >>> agreement(np.array([[1.0, -np.inf]]), np.array([[0.5, -np.inf]])).relative_error
        0.5
    """
    if reference.shape != outputs.shape:
        raise ValueError(f"agreement: expected outputs of shape {reference.shape}, got {outputs.shape}. Compare alike.")
    kind = np.result_type(reference, outputs, np.float64)
    wanted, found = reference.astype(kind), outputs.astype(kind)
    alike = np.isinf(wanted) & (wanted == found)
    wanted[alike] = found[alike] = 0
    difference = np.abs(found - wanted)
    finite = bool(np.isfinite(difference).all())
    norm = float(np.linalg.norm(wanted))
    return Agreement(
        max_abs_error=float(difference.max()) if finite else float("inf"),
        relative_error=float(np.linalg.norm(difference)) / max(norm, 1e-30) if finite else float("inf"),
        top1_agreement=1.0 if kind.kind == "c" else float((reference.argmax(-1) == outputs.argmax(-1)).mean()),
        num_samples=len(reference),
    )
