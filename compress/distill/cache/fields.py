"""How one tensor for each sample lies in a cache: as it is, or as the largest probabilities and the rest's sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import DataError, RecipeError

__all__ = ["Field", "record_dtype"]


@dataclass(frozen=True)
class Field:
    """What is stored of one tensor.

    Args:
        shape: Of one sample.
        dtype: ``"float16"`` or ``"float32"``.
        top_k: Store the k largest log-probabilities of logits (C,), their classes, and the sum of all others, which
            are read back as if they shared it equally.

    Raises:
        RecipeError: when top_k does not fit the shape, or the dtype is unknown.

    Example:
        >>> field = Field((1000,), top_k=4)
        >>> field.dtype_of_row.itemsize
        26
    """

    shape: tuple[int, ...]
    dtype: str = "float16"
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise RecipeError(f"teacher.cache_dtype: expected float16 or float32, got {self.dtype!r}. Choose one.")
        if self.top_k is not None and (len(self.shape) != 1 or not 1 <= self.top_k < self.shape[0]):
            raise RecipeError(
                f"teacher.cache_top_k: expected a number in [1, C) for logits of shape (C,), got {self.top_k} for "
                f"{self.shape}. Leave it out to store all."
            )

    @property
    def dtype_of_row(self) -> np.dtype:
        """What one sample is on disk."""
        if self.top_k is None:
            return np.dtype([("values", self.dtype, self.shape)])
        return np.dtype(
            [("values", self.dtype, (self.top_k,)), ("classes", "<i4", (self.top_k,)), ("rest", self.dtype)]
        )

    def pack(self, values: Tensor, rows: np.ndarray) -> None:
        """Write values (N, *shape) into rows (N,).

        Raises:
            DataError: when a value is not finite in the field's type.
        """
        if self.top_k is None:
            self._store(values, rows["values"])
            return
        log_probabilities = values.float().log_softmax(1)
        largest, classes = log_probabilities.topk(self.top_k, dim=1)
        rest = torch.log1p(-largest.exp().sum(1).clamp(max=1 - 1e-7))
        self._store(largest, rows["values"])
        rows["classes"] = classes.numpy()
        self._store(rest, rows["rest"])

    def unpack(self, rows: np.ndarray) -> Tensor:
        """Return values (N, *shape) in float32."""
        values = torch.from_numpy(rows["values"].astype(np.float32))
        if self.top_k is None:
            return values
        others = torch.from_numpy(rows["rest"].astype(np.float32)) - math.log(self.shape[0] - self.top_k)
        logits = others[:, None].repeat(1, self.shape[0])
        return logits.scatter_(1, torch.from_numpy(rows["classes"].astype(np.int64)), values)

    def describe(self) -> str:
        """Return the field in a few words.

        Example:
            >>> Field((1000,), top_k=4).describe()
            '(1000,) as float16, the largest 4'
        """
        return f"{self.shape} as {self.dtype}" + (f", the largest {self.top_k}" if self.top_k else "")

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        return {**asdict(self), "shape": list(self.shape)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Field:
        """Read what ``to_json`` gave."""
        return Field(tuple(content["shape"]), content["dtype"], content["top_k"])

    def _store(self, values: Tensor, rows: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            rows[...] = values.numpy()
        if not np.isfinite(rows).all():
            raise DataError(
                f"cache: expected values that {self.dtype} can hold, got some beyond ±{np.finfo(self.dtype).max:g}. "
                "Set teacher.cache_dtype to float32."
            )


def record_dtype(fields: Mapping[str, Field]) -> np.dtype:
    """Return what all fields of one sample are on disk, side by side and without gaps."""
    return np.dtype([(str(number), field.dtype_of_row) for number, field in enumerate(fields.values())])
