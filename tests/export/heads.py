"""Networks with several outputs, and an artefact of each, made once for the tests of export and runtime."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.export import export_artifact
from compress.surgery.capture import export_program
from tests.export.programs import HERE
from tests.networks import images

HERE_SEVERAL = [name for name in HERE if name != "litert"]
_QUICK = [name for name in HERE_SEVERAL if name != "aoti"]


class TwoHeads(nn.Module):
    """A conv net that says what it sees, and where: scores (N, 3) and boxes (N, 2, 4), in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.classes, self.boxes = nn.Linear(16, 3), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.adaptive_avg_pool2d(F.relu(self.body(F.relu(self.stem(x)))), 1).flatten(1)
        return self.classes(x), self.boxes(x).reshape(-1, 2, 4)


class Encoder(nn.Module):
    """A transformer over tokens and their mask: features (N, L, 16) and logits (N, 2), in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0])
        weights = mask[:, :, None].to(x.dtype)
        return {"features": x, "logits": self.fc((x * weights).sum(1) / weights.sum(1))}


class Several(NamedTuple):
    """A network, what it is checked on, and its artefact."""

    network: nn.Module
    inputs: list[Tensor]
    artifact: Path


def trained() -> TwoHeads:
    """Return a conv net whose scores tell the classes and whose boxes the images."""
    torch.manual_seed(0)
    network = TwoHeads()
    fit(network, 40)
    return network


def fit(network: nn.Module, steps: int) -> None:
    """Train a net of two heads a little."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    x, y = images(96)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.train()
        for _ in range(steps):
            optimizer.zero_grad()
            scores, boxes = network(x)
            (F.cross_entropy(scores, y) + F.mse_loss(boxes.flatten(1), x.flatten(1)[:, :8])).backward()
            optimizer.step()
        network.eval()


def tokens(num: int, length: int = 6) -> list[Tensor]:
    """Return tokens and mask, shape (num, length) each."""
    generator = torch.Generator().manual_seed(num)
    values = torch.randint(12, (num, length), generator=generator)
    lengths = torch.randint(1, length + 1, (num, 1), generator=generator)
    return [values, (torch.arange(length) < lengths).long()]


@cache
def two_heads() -> Several:
    """Export the conv net for every engine that is installed; do not change the files."""
    return _exported(trained(), [images(130, seed=2)[0]], HERE_SEVERAL, labels=["left", "middle", "right"])


@cache
def encoder() -> Several:
    """Export the transformer for every engine but the one that takes long to compile; do not change the files."""
    torch.manual_seed(0)
    return _exported(Encoder().eval(), tokens(130), _QUICK, labels=["bad", "good"])


def _exported(network: nn.Module, inputs: list[Tensor], targets: list[str], *, labels: list[str]) -> Several:
    folder = Path(tempfile.mkdtemp(prefix="several"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = export_program(network, [value[:2] for value in inputs])
    metadata = {"labels": labels, "task": "classification"}
    path = folder / "several"
    export_artifact(program, path, targets=targets, reference=network, held_out=inputs, metadata=metadata)
    return Several(network, inputs, path)
