"""Augmentations of a batch of images, as functions of what was drawn."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flip_images", "shift_images"]


def shift_images(x: Tensor, offsets: Tensor, *, fill: Tensor) -> Tensor:
    """Move each image by its own whole number of pixels.

    Args:
        x: Images, shape (N, C, H, W).
        offsets: Pixels down and right, integers of either sign, shape (N, 2).
        fill: Value of the pixels that come in at the border, shape (C,).

    Returns:
        Images of the same shape.

    Example:
        >>> shift_images(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([[0, 1]]), fill=torch.tensor([0]))
        tensor([[[[0, 1],
                  [0, 3]]]])
    """
    num, (height, width) = len(x), x.shape[-2:]
    border = int(offsets.abs().max())
    padded = fill.to(x)[None, :, None, None].repeat(num, 1, height + 2 * border, width + 2 * border)
    padded[..., border : border + height, border : border + width] = x
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(num, device=x.device), :, border - offsets[:, 0], border - offsets[:, 1]]


def flip_images(x: Tensor, flipped: Tensor) -> Tensor:
    """Mirror some images left to right.

    Args:
        x: Images, shape (N, C, H, W).
        flipped: Which ones, booleans of shape (N,).

    Returns:
        Images of the same shape.

    Example:
        >>> flip_images(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([True, False]))
        tensor([[[[2, 1]]],
        <BLANKLINE>
        <BLANKLINE>
                [[[3, 4]]]])
    """
    return torch.where(flipped[:, None, None, None], x.flip(3), x)
