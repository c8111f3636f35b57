"""Small networks that no library ships: residual nets for small images, a 1-D CNN, an LSTM classifier.

They are built from standard modules only, so that ``torch.export`` captures them and pruning can follow their
channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.errors import RecipeError

__all__ = ["BasicBlock", "ConvNet1d", "LSTMClassifier", "ResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, as in He et al. 2015, arXiv:1512.03385.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution; the shortcut is a 1x1 convolution where size or channels change.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR-style residual network for small images.

    The stem keeps the resolution; stage *i* has ``width * 2**i`` channels and every stage but the first halves
    height and width. ``ResNet(width=16, blocks=(3, 3, 3))`` is ResNet-20 with 1x1 shortcuts. Any image of at least
    1x1 goes in; 8x8 images fit up to four stages without being worn down to a point before the last one.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        width: Channels of the stem and of the first stage.
        blocks: Residual blocks of each stage.
        kernel: Odd kernel size of the stem.

    Raises:
        RecipeError: when a count is not positive or the kernel is even.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 16,
        blocks: tuple[int, ...] = (3, 3, 3),
        kernel: int = 3,
    ) -> None:
        super().__init__()
        _check_positive("ResNet", {"in_channels": in_channels, "num_classes": num_classes, "width": width})
        if not blocks or min(blocks) < 1:
            raise RecipeError(f"ResNet.blocks: expected one positive number a stage, got {blocks}. Use (3, 3, 3), say.")
        _check_odd("ResNet", kernel)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages, channels = [], width
        for i, num_blocks in enumerate(blocks):
            stage = []
            for j in range(num_blocks):
                stage.append(BasicBlock(channels, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
                channels = width * 2**i
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        return self.fc(torch.flatten(self.pool(self.stages(self.stem(x))), 1))


class ConvNet1d(nn.Module):
    """Fully convolutional network for time series, as in Wang et al. 2016, arXiv:1611.06455.

    Three convolutions with ``width``, ``2 * width`` and ``width`` channels, average pooling over time, one linear
    layer. The published network has ``width=128``.

    Args:
        in_channels: Variables of the series.
        num_classes: Number of logits.
        width: Channels of the first convolution.
        kernels: Odd kernel sizes of the three convolutions.

    Raises:
        RecipeError: when a count is not positive or a kernel is even.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 5,
        width: int = 64,
        kernels: tuple[int, int, int] = (7, 5, 3),
    ) -> None:
        super().__init__()
        _check_positive("ConvNet1d", {"in_channels": in_channels, "num_classes": num_classes, "width": width})
        layers: list[nn.Module] = []
        channels = in_channels
        for out_channels, kernel in zip((width, 2 * width, width), kernels, strict=True):
            _check_odd("ConvNet1d", kernel)
            layers += [
                nn.Conv1d(channels, out_channels, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm1d(out_channels),
                nn.ReLU(),
            ]
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Linear(channels, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map series (N, in_channels, L) to logits (N, num_classes)."""
        return self.fc(torch.flatten(self.pool(self.features(x)), 1))


class LSTMClassifier(nn.Module):
    """An LSTM whose last output is classified by a linear layer.

    Args:
        in_features: Features of each step.
        num_classes: Number of logits.
        hidden: Size of the hidden state.
        num_layers: Stacked layers.

    Raises:
        RecipeError: when a count is not positive.
    """

    def __init__(self, in_features: int = 1, num_classes: int = 5, hidden: int = 64, num_layers: int = 1) -> None:
        super().__init__()
        counts = {"in_features": in_features, "num_classes": num_classes, "hidden": hidden, "num_layers": num_layers}
        _check_positive("LSTMClassifier", counts)
        self.lstm = nn.LSTM(in_features, hidden, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences (N, L, in_features) to logits (N, num_classes)."""
        outputs, _ = self.lstm(x)
        return self.fc(outputs[:, -1])


def _check_positive(name: str, counts: Mapping[str, int]) -> None:
    for key, value in counts.items():
        if value < 1:
            raise RecipeError(f"{name}.{key}: expected a positive number, got {value}. Use 16, say.")


def _check_odd(name: str, kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise RecipeError(
            f"{name}.kernel: expected an odd number, got {kernel}. Use 3, say; even ones shift the image."
        )


def _init_convolutions(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
