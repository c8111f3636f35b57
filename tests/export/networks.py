"""Tiny networks of three kinds, quantised by calibration, for parity of engines."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from compress.models import LSTMClassifier
from compress.quantize import calibrate, convert, prepare
from compress.surgery.capture import export_program

KINDS = ("cnn", "transformer", "lstm")


class Network(NamedTuple):
    """A float program and its int8 twin, with the modules they must agree with."""

    program: ExportedProgram
    reference: nn.Module
    integers: ExportedProgram
    prepared: nn.Module
    inputs: Tensor


class Transformer(nn.Module):
    """One block of attention and a gated product over tokens that come as vectors."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


_MAKE = {
    "cnn": (_cnn, (3, 8, 8)),
    "transformer": (Transformer, (6, 16)),
    "lstm": (lambda: LSTMClassifier(3, 5, 16, 2), (9, 3)),
}


class Floats(NamedTuple):
    """A float program, and the module it must agree with."""

    program: ExportedProgram
    reference: nn.Module
    inputs: Tensor


@cache
def floats(kind: str) -> Floats:
    """Return a network of a kind with random weights, not quantised."""
    torch.manual_seed(0)
    make, shape = _MAKE[kind]
    reference = make().eval()
    inputs = torch.randn(65, *shape)
    return Floats(export_program(reference, (inputs[:2],)), reference, inputs)


@cache
def network(kind: str, scheme: str = "int8_portable") -> Network:
    """Return a network of a kind with random weights, and its int8 twin."""
    program, reference, inputs = floats(kind)
    prepared = prepare(reference, (inputs[:2],), scheme)
    calibrate(prepared, [(inputs,)])
    prepared.eval()
    return Network(program, reference, export_program(convert(prepared), (inputs[:2],)), prepared, inputs)
