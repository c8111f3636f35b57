"""A network as of another library, in a module that is quickly imported, as fresh processes do that measure it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Library(nn.Module):
    """As a network of another library: a root with its own parameter and buffer, and an answer that is an object."""

    scale: Tensor

    def __init__(self, width: int = 4, *, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.Dropout(0.5))
        self.head = nn.Linear(width, classes)
        self.bias = nn.Parameter(torch.randn(classes))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.head(self.body(x)) * self.scale + self.bias)


def build(width: int, **arguments: int) -> Library:
    return Library(width, **arguments)
