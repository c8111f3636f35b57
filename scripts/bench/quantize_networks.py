"""The networks of the quantization benchmark, in plain torch: random weights, since only time counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.models import BasicBlock, LSTMClassifier

__all__ = ["NETWORKS", "Sizes", "make"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs.

    Args:
        image: Height and width in pixels.
        tokens: Of a text.
        steps: Of a sequence.
    """

    image: int = 224
    tokens: int = 128
    steps: int = 100


def make(name: str, sizes: Sizes) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Return a network of ``NETWORKS``, and what makes a batch of inputs."""
    torch.manual_seed(0)
    network, inputs = NETWORKS[name]
    return network(), lambda batch: inputs(batch, sizes)


class ResNet18(nn.Module):
    """As in He et al. 2015, arXiv:1512.03385."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        channels = 64
        for stage in range(4):
            for block in range(2):
                layers.append(BasicBlock(channels, 64 * 2**stage, stride=2 if stage and not block else 1))
                channels = 64 * 2**stage
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, 1000)."""
        return self.fc(nn.functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class _Inverted(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, *, stride: int, expand: int) -> None:
        super().__init__()
        hidden = in_channels * expand
        layers = [] if expand == 1 else [_convolution(in_channels, hidden, 1)]
        layers += [_convolution(hidden, hidden, 3, stride=stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class MobileNetV2(nn.Module):
    """As in Sandler et al. 2018, arXiv:1801.04381, table 2."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, 32, 3, stride=2)]
        channels = 32
        table = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        for expand, width, num, stride in table:
            for block in range(num):
                layers.append(_Inverted(channels, width, stride=1 if block else stride, expand=expand))
                channels = width
        layers.append(_convolution(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, 1000)."""
        return self.fc(nn.functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = _Attention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class BERT(nn.Module):
    """As in Devlin et al. 2018, arXiv:1810.04805; six layers of MiniLM's width, 384, with 12 heads."""

    def __init__(self, width: int = 384, heads: int = 12, hidden: int = 1536, num_layers: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(30522, width)
        self.positions = nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(_Layer(width, heads, hidden) for _ in range(num_layers)))
        self.pooler = nn.Linear(width, width)
        self.fc = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, L) to logits (N, 2)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.layers(self.norm(self.words(tokens) + self.positions(places)))
        return self.fc(torch.tanh(self.pooler(x[:, 0])))


def _convolution(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Module:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU6())


def _image(batch: int, sizes: Sizes) -> Tensor:
    return torch.randn(batch, 3, sizes.image, sizes.image)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, Sizes], Tensor]]] = {
    "resnet18": (ResNet18, _image),
    "mobilenet_v2": (MobileNetV2, _image),
    "bert6": (BERT, lambda batch, sizes: torch.randint(30522, (batch, sizes.tokens))),
    "lstm": (
        lambda: LSTMClassifier(64, 10, hidden=256, num_layers=2),
        lambda batch, sizes: torch.randn(batch, sizes.steps, 64),
    ),
}
"""Network and inputs by name; the LSTM reads 64 features a step."""
