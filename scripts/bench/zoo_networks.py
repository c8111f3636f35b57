"""Hand-written networks of the zoo that no library ships."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.models import ConvNet1d, LSTMClassifier

Made = tuple[nn.Module, tuple[Tensor, ...]]


def lstm() -> Made:
    """An LSTM and a linear layer."""
    return LSTMClassifier(4, 5, hidden=32), (torch.randn(2, 9, 4),)


class _GRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.gru = nn.GRU(24, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.gru(self.embed(tokens))[0].mean(1)))


def gru() -> Made:
    """Two bidirectional layers of GRU over embedded tokens."""
    return _GRU(), (torch.randint(0, 50, (2, 9)),)


def conv1d() -> Made:
    """Convolutions over time."""
    return ConvNet1d(in_channels=2, num_classes=5), (torch.randn(2, 2, 64),)


class _GroupedQueries(nn.Module):
    """Attention in which two query heads share a key head."""

    def __init__(self, width: int = 48, heads: int = 8, keys: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.heads, self.keys, self.size = heads, keys, width // heads
        self.query = nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, keys * self.size) for _ in range(2))
        self.out = nn.Linear(width, width)
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        num, length, _ = x.shape
        y = self.norm(x)
        q = self.query(y).view(num, length, self.heads, self.size).transpose(1, 2)
        k, v = (m(y).view(num, length, self.keys, self.size).transpose(1, 2) for m in (self.key, self.value))
        k, v = (t.repeat_interleave(self.heads // self.keys, dim=1) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + self.out(y.transpose(1, 2).reshape(num, length, -1))).mean(1))


def grouped_queries() -> Made:
    """A layer of grouped-query attention."""
    return _GroupedQueries(), (torch.randint(0, 50, (2, 9)),)


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
        self.down2 = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.SiLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        return self.head(self.merge(torch.cat([first, self.up(self.down2(first))], 1)))


def unet() -> Made:
    """A small U-Net with group normalisation and a transposed convolution."""
    return _UNet(), (torch.randn(2, 1, 16, 16),)


def weight_norm() -> Made:
    """Convolutions whose weights are normalised by a parametrization."""
    normalise = nn.utils.parametrizations.weight_norm
    network = nn.Sequential(
        normalise(nn.Conv2d(3, 16, 3, padding=1)),
        nn.ReLU(),
        normalise(nn.Conv2d(16, 32, 3, padding=1)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    return network, (torch.randn(2, 3, 16, 16),)
