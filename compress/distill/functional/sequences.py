"""Formulas between sequences of tokens. Padding does not count: a mask says which tokens do."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.distill.functional.precision import check_same_shape, full_precision, token_weights
from compress.errors import RecipeError

__all__ = ["attention_maps", "cosine_embedding", "hidden_states", "self_attention_relation", "token_soft_target"]


def token_soft_target(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    r"""Compare softened probabilities of every token.

    .. math:: L = \frac{T^2}{|M|} \sum_{i \in M} KL(\mathrm{softmax}(t_i / T) \,\|\, \mathrm{softmax}(s_i / T))

    Kim and Rush 2016, arXiv:1606.07947, section 3.1 (word-level), as a divergence instead of a cross-entropy.

    Args:
        student: Logits s, shape (N, L, V).
        teacher: Logits t, shape (N, L, V).
        mask: Tokens M that count, booleans of shape (N, L); all without one.
        temperature: T > 0.

    Returns:
        Scalar mean over the tokens that count, in nats.

    Raises:
        RecipeError: when the shapes differ, or the mask's is not (N, L).

    Example:
        >>> logits = torch.tensor([[[1.0, 2.0], [5.0, 0.0]]])
        >>> token_soft_target(logits, logits.flip(2), torch.tensor([[True, False]]))
        tensor(0.4621)
    """
    check_same_shape("token_soft_target", student, teacher)
    student, teacher = (logits / temperature for logits in full_precision(student, teacher))
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return temperature**2 * _over_tokens(divergence, mask)


def cosine_embedding(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Compare directions.

    .. math:: L = \frac{1}{|M|} \sum_{i \in M} (1 - \cos(s_i, t_i))

    Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 3.

    Args:
        student: Embeddings s, shape (N, D), or tokens, (N, L, D).
        teacher: Embeddings t, of the same shape.
        mask: Tokens M that count, booleans of shape (N, L); all without one.

    Returns:
        Scalar mean, in [0, 2].

    Raises:
        RecipeError: when the shapes differ, or the mask's is not (N, L).

    Example:
        >>> cosine_embedding(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.)
    """
    check_same_shape("cosine_embedding", student, teacher)
    student, teacher = full_precision(student, teacher)
    distance = 1 - F.cosine_similarity(student, teacher, dim=-1)
    return _over_tokens(distance, mask) if distance.dim() == 2 else distance.mean()


def hidden_states(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Compare token representations by mean squared distance.

    .. math:: L = \frac{1}{|M| D} \sum_{i \in M} \|s_i - t_i\|^2

    Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, equation 8; s has been projected to the teacher's width.

    Args:
        student: Tokens s, shape (N, L, D).
        teacher: Tokens t, shape (N, L, D).
        mask: Tokens M that count, booleans of shape (N, L); all without one.

    Returns:
        Scalar mean.

    Raises:
        RecipeError: when the shapes differ, or the mask's is not (N, L).

    Example:
        >>> hidden_states(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor([[True, False]]))
        tensor(1.)
    """
    check_same_shape("hidden_states", student, teacher)
    student, teacher = full_precision(student, teacher)
    return _over_tokens((student - teacher).square().mean(-1), mask)


def attention_maps(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Compare attention maps by mean squared distance.

    .. math:: L = \frac{1}{H} \sum_h \mathrm{MSE}(A^s_h, A^t_h)

    Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, equation 7; the mean is over pairs of tokens that both count.

    Args:
        student: Maps A, shape (N, H, L, L), queries before keys.
        teacher: Maps of the same shape.
        mask: Tokens that count, booleans of shape (N, L); all without one.

    Returns:
        Scalar mean.

    Raises:
        RecipeError: when the shapes differ, or the mask's is not (N, L).

    Example:
        >>> attention_maps(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3))
        tensor(1.)
    """
    check_same_shape("attention_maps", student, teacher)
    student, teacher = full_precision(student, teacher)
    distance = (student - teacher).square().mean(1)
    counts = (token_weights(distance, mask) > 0).to(distance)
    pairs = counts[:, :, None] * counts[:, None, :]
    return (distance * pairs).sum() / pairs.sum().clamp(min=1)


def self_attention_relation(student: Tensor, teacher: Tensor, *, num_heads: int, mask: Tensor | None = None) -> Tensor:
    r"""Compare how tokens relate to each other in queries, keys or values.

    .. math:: L = \frac{1}{A |M|} \sum_{a} \sum_{i \in M} KL(R^t_{a,i} \,\|\, R^s_{a,i}), \quad
              R_a = \mathrm{softmax}(X_a X_a^\top / \sqrt{d})

    X_a is the a-th of A slices of the width. Wang et al. 2021 (MiniLMv2), arXiv:2012.15828, section 3.1. Widths may
    differ.

    Args:
        student: Projections X, shape (N, L, D).
        teacher: Projections X, shape (N, L, E).
        num_heads: A; divides D and E.
        mask: Tokens M that count, booleans of shape (N, L); all without one.

    Returns:
        Scalar mean, in nats.

    Raises:
        RecipeError: when ``num_heads`` does not divide a width, or the mask's shape is not (N, L).

    Example:
        >>> x = torch.randn(2, 5, 8)
        >>> self_attention_relation(x, x, num_heads=4)
        tensor(0.)
    """
    for name, width in (("student", student.shape[-1]), ("teacher", teacher.shape[-1])):
        if width % num_heads:
            raise RecipeError(
                f"num_heads: expected a divisor of the {name}'s width {width}, got {num_heads}. "
                f"Use {math.gcd(student.shape[-1], teacher.shape[-1])}, say."
            )
    student, teacher = full_precision(student, teacher)
    share = token_weights(student, mask)
    hidden = (share == 0)[:, None, None, :] if mask is not None else None
    ours, theirs = (_relation(tokens, num_heads, hidden) for tokens in (student, teacher))
    terms = F.kl_div(ours, theirs, reduction="none", log_target=True)
    if hidden is not None:
        terms = terms.masked_fill(hidden, 0.0)
    return (terms.sum(-1).mean(1) * share).sum()


def _relation(tokens: Tensor, num_heads: int, hidden: Tensor | None) -> Tensor:
    """Return log R, shape (N, A, L, L)."""
    heads = tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    scores = heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])
    if hidden is not None:  # not -inf: rows without any token would become NaN, and so would their gradients
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min / 2)
    return scores.log_softmax(-1)


def _over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over tokens that count; what stands in the others is left out even when it is not finite."""
    share = token_weights(values, mask)
    return torch.where(share > 0, values, 0.0).mul(share).sum()
