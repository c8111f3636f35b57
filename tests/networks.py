"""Small networks and loaders that several tests share."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Residual(nn.Module):
    """A conv net with everything that goes wrong: a residual sum, odd BatchNorm constants, dropout."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width, eps=1e-3, momentum=0.3)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width, eps=1e-2)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(x + self.norm2(self.conv2(y)))
        return self.fc(self.dropout(x.mean((2, 3))))


def images(num: int = 48, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return learnable random images (num, 1, 8, 8) in three classes and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=generator)
    x = torch.randn(num, 1, 8, 8, generator=generator)
    x[:, 0, :3, :3] += (labels - 1.0)[:, None, None]
    return x, labels


def loader(*, num: int = 48, batch_size: int = 12, shuffle: bool = True, seed: int = 0) -> DataLoader:
    return DataLoader(TensorDataset(*images(num, seed=seed)), batch_size=batch_size, shuffle=shuffle)


def trainer(**arguments: Any) -> pl.Trainer:
    """Return a silent Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**quiet, **arguments})
