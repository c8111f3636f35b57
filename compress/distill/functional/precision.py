"""What all formulas share: the precision they are computed in, and checks of shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import RecipeError

__all__ = ["check_same_shape", "full_precision", "token_weights", "weighted_mean"]


def full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one floating type: float64 where the first is, float32 otherwise.

    Example:
        >>> [t.dtype for t in full_precision(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64))]
        [torch.float32, torch.float32]
    """
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def check_same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse tensors of different shapes.

    Raises:
        RecipeError: naming the formula and both shapes.
    """
    if student.shape == teacher.shape:
        return
    classes = student.dim() == teacher.dim() and student.shape[:-1] == teacher.shape[:-1]
    hint = (
        f"They differ in the last size, {student.shape[-1]} and {teacher.shape[-1]}: for logits, give both networks "
        "the same classes."
        if classes
        else "Compare layers of one size, or use a loss that matches sizes."
    )
    raise RecipeError(
        f"{name}: expected student and teacher of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}. "
        f"{hint}"
    )


def weighted_mean(values: Tensor, sample_weights: Tensor | None) -> Tensor:
    """Return the mean over everything, each sample's values times its weight.

    Args:
        values: Shape (N, ...).
        sample_weights: Shape (N,), or none for weights of 1.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]))
        tensor(0.5000)
    """
    if sample_weights is None:
        return values.mean()
    return (values * sample_weights.to(values).view(-1, *[1] * (values.dim() - 1))).mean()


def token_weights(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return the share of each token in a mean over those that count.

    Args:
        tokens: Shape (N, L, ...).
        mask: Which tokens count, shape (N, L); all without one.

    Returns:
        Shape (N, L), with a sum of 1; zeros when no token counts.

    Raises:
        RecipeError: when the mask's shape is another.

    Example:
        >>> token_weights(torch.zeros(1, 4, 8), torch.tensor([[True, True, False, False]]))
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """
    if mask is None:
        return tokens.new_full(tokens.shape[:2], 1 / max(1, tokens.shape[:2].numel()))
    if mask.shape != tokens.shape[:2]:
        raise RecipeError(
            f"mask: expected shape {tuple(tokens.shape[:2])}, one entry a token, got {tuple(mask.shape)}. "
            "Give the attention mask of the same batch, booleans of shape (N, L)."
        )
    counts = mask.to(tokens.dtype)
    return counts / counts.sum().clamp(min=1)
