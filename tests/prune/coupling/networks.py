"""Small networks, each with one thing that makes pruning hard."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.models import ConvNet1d, LSTMClassifier, ResNet
from tests.networks import Residual

__all__ = ["NETWORKS"]


class Attention(nn.Module):
    """A transformer block with one matrix for queries, keys and values, a position table and a layer scale."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(3, width)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width))
        self.bias = nn.Parameter(torch.randn(heads, 5, 5))
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        num, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(num, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * 0.5 + self.bias
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(num, length, width)
        x = x + self.scale * self.proj(y)
        x = x + self.mlp(x)
        return self.head(x.mean(1))


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention``, whose code has its width written in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class GroupedQueries(nn.Module):
    """Two query heads share a key head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out = nn.Linear(12, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        num, length, _ = x.shape
        q = self.q(x).view(num, length, 4, 3).transpose(1, 2)
        k, v = (m(x).view(num, length, 2, 3).transpose(1, 2).repeat_interleave(2, 1) for m in (self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(num, length, 12)
        return self.head((x + self.out(y)).mean(1))


class Shuffled(nn.Module):
    """Split, depthwise convolution, concatenation, channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.point = nn.Conv2d(6, 6, 1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).chunk(2, 1)
        x = torch.cat([first, self.norm(self.depth(self.point(second).relu()))], 1)
        num, channels, height, width = x.shape
        x = x.view(num, 2, channels // 2, height, width).transpose(1, 2).reshape(num, channels, height, width)
        return self.head(x).mean((2, 3))


class Dense(nn.Module):
    """Everything so far is read again, and a gate looks at the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.c = nn.Conv2d(10, 8, 1)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = nn.Linear(8 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.c(torch.cat([x, self.b(x).relu()], 1))
        gate = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        x = nn.functional.max_pool2d(x * gate[:, :, None, None], 2)
        return self.head(x.flatten(1))


class Mixer(nn.Module):
    """Layers over tokens and layers over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.tokens = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
        self.channels = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(x)).mean(1))


class Grouped(nn.Module):
    """Group normalisation, grouped and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.b = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.b(self.norm(self.a(x)).relu()))).mean((2, 3))


class Recurrent(nn.Module):
    """Two bidirectional layers of GRU over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.gru = nn.GRU(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(tokens))[0][:, -1])


IMAGE = torch.randn(2, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(2))
VECTORS = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

NETWORKS: dict[str, tuple[type[nn.Module] | object, Tensor]] = {
    "residual": (lambda: Residual(6), IMAGE),
    "resnet": (lambda: ResNet(in_channels=1, width=4, blocks=(1, 2)), IMAGE),
    "conv1d": (lambda: ConvNet1d(width=6), IMAGE[:, 0, :1].repeat(1, 1, 4)),
    "attention": (Attention, VECTORS),
    "torch_attention": (TorchAttention, TOKENS),
    "grouped_queries": (GroupedQueries, VECTORS),
    "shuffled": (Shuffled, IMAGE),
    "dense": (Dense, IMAGE),
    "mixer": (Mixer, VECTORS),
    "grouped": (Grouped, IMAGE),
    "lstm": (lambda: LSTMClassifier(3, 2, hidden=6, num_layers=2), VECTORS),
    "gru": (Recurrent, TOKENS),
}
