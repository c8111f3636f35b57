"""Seeded splits that keep the share of every class."""

from __future__ import annotations

import numpy as np

from compress.errors import DataError

__all__ = ["stratified_split"]


def stratified_split(labels: np.ndarray, num: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose ``num`` samples at random so that each class keeps its share, to within one sample.

    Args:
        labels: Integer classes, shape (N,).
        num: Samples to choose.
        seed: Of the choice; the same seed and labels give the same split on every machine.

    Returns:
        Ascending indices of the rest, shape (N - num,), and of the chosen ones, shape (num,).

    Raises:
        DataError: when ``num`` is not in [0, N].

    Example:
        >>> rest, chosen = stratified_split(np.array([0, 0, 0, 0, 1, 1]), 3, seed=0)
        >>> np.bincount(np.array([0, 0, 0, 0, 1, 1])[chosen])
        array([2, 1])
    """
    if not 0 <= num <= len(labels):
        raise DataError(
            f"split: expected between 0 and {len(labels)} samples, got {num}. Choose fewer than the data has."
        )
    classes, counts = np.unique(labels, return_counts=True)
    shares = counts * (num / max(1, len(labels)))
    quotas = np.floor(shares).astype(int)
    # Largest remainders get what rounding down has left over; a stable sort settles ties by class.
    quotas[np.argsort(quotas - shares, kind="stable")[: num - quotas.sum()]] += 1
    generator = np.random.default_rng(seed)
    chosen = [
        generator.permutation(np.flatnonzero(labels == value))[:quota]
        for value, quota in zip(classes, quotas, strict=True)
    ]
    indices = np.sort(np.concatenate([np.empty(0, dtype=int), *chosen]))
    return np.setdiff1d(np.arange(len(labels)), indices), indices
