"""Trained little programs and one artefact, made once for all tests of export and runtime."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from compress.data import Tokenizer
from compress.export import TARGETS, Gates, export_artifact
from compress.measure.machine import has_vnni
from compress.quantize import calibrate, convert, prepare
from compress.runtime.engines import device_of, missing_package
from compress.runtime.trust import sign
from compress.surgery.capture import export_program
from tests.data.files import write_tokenizer
from tests.networks import images

LABELS = ["left", "middle", "right"]
ON_CPU = [name for name in TARGETS if device_of(name) == "cpu" and name != "aoti_bf16"]
HERE = [name for name in ON_CPU if missing_package(name) is None and (name != "aoti" or has_vnni())]
PREPROCESSING = {"scale": 0.5, "mean": [0.1], "std": [2.0], "layout": "NCHW"}


class Trained(NamedTuple):
    """A program with the module it must agree with."""

    program: ExportedProgram
    reference: nn.Module
    inputs: Tensor


class Small(nn.Module):
    """A residual net with one input channel; without BatchNorm, whose folding takes PT2E a quarter of a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        # Not x.relu(): PT2E's x86 quantizer does not know the method and leaves floats around it.
        x = F.relu(self.stem(x))
        x = F.relu(self.a2(F.relu(self.a1(x))) + x)
        x = F.relu(self.b2(F.relu(self.b1(x))) + self.shortcut(x))
        return self.fc(self.pool(x).flatten(1))


@cache
def floating() -> Trained:
    """Return a trained float network."""
    torch.manual_seed(0)
    network = Small()
    _train(network, 40, 1e-2)
    inputs = images(150, seed=2)[0]
    return Trained(export_program(network.eval(), [inputs[:2]]), network, inputs)


@cache
def quantized() -> Trained:
    """Return the same network after some quantization-aware training."""
    torch.manual_seed(0)
    network = Small()
    network.load_state_dict(floating().reference.state_dict())
    prepared = prepare(network, [images(2)[0]], "int8")
    _train(prepared, 10, 1e-3)
    inputs = images(150, seed=2)[0]
    return Trained(export_program(convert(prepared.eval()), [inputs[:2]]), prepared, inputs)


class Tiny(nn.Module):
    """What is quickly built and loaded, for tests that are about files and errors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


@cache
def tiny() -> Trained:
    """Return an int8 network of a single product, which takes what ``quantized`` takes."""
    torch.manual_seed(0)
    inputs = images(150, seed=2)[0]
    prepared = prepare(Tiny().eval(), [inputs[:2]], "int8")
    calibrate(prepared, [(inputs,)])
    return Trained(export_program(convert(prepared.eval()), [inputs[:2]]), prepared, inputs)


@cache
def artifact() -> Path:
    """Export the quantised network for every engine that is installed; do not change the files.

    The processes of one run share it.
    """
    folder = Path(os.environ["COMPRESS_TESTS"])
    with FileLock(folder / "artifact.lock"):
        if not (folder / "artifact" / "small").exists():
            _export(folder / "artifact" / "small")
    return folder / "artifact" / "small"


def _export(path: Path) -> None:
    trained = quantized()
    export_artifact(
        trained.program,
        path,
        targets=HERE,
        reference=trained.reference,
        held_out=[trained.inputs],
        scheme="int8",
        gates=Gates(min_top1_agreement=0.95),
        metadata={
            "name": "small",
            "task": "classification",
            "labels": LABELS,
            "preprocessing": PREPROCESSING,
            "metrics": {"accuracy": 0.9},
            "history": [{"kind": "quantize"}],
        },
    )


class Reviewer(nn.Module):
    """Reads words 4 and 5 of a text as praise and blame; what only fills does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.fc = nn.Linear(6, 2)
        with torch.no_grad():
            praise = self.fc.weight[1] - self.fc.weight[0]
            self.embed.weight[4], self.embed.weight[5] = 9 * praise, -9 * praise

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        weights = mask.unsqueeze(2).to(torch.float32)
        return self.fc((self.embed(tokens) * weights).sum(1) / weights.sum(1))


class Reviews(NamedTuple):
    """A network that reads texts, and its artefact."""

    program: ExportedProgram
    network: nn.Module
    tokenizer: Tokenizer
    artifact: Path


@cache
def reviews() -> Reviews:
    """Export a network of tokens and mask with its tokenizer; do not change the files."""
    folder = Path(tempfile.mkdtemp(prefix="reviews"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = Tokenizer(write_tokenizer(folder / "words.json", "fine dull a film"), 7)
    torch.manual_seed(0)
    network, inputs = Reviewer().eval(), tokenizer(["fine film", "dull", "a film", "a"])
    program = export_program(network, [tensor[:2] for tensor in inputs])
    export_artifact(
        program,
        folder / "reviews",
        targets=["eager", "onnxruntime"],
        reference=network,
        held_out=inputs,
        metadata={"labels": ["bad", "good"], "preprocessing": tokenizer.preprocessing},
        files=tokenizer.files,
    )
    return Reviews(program, network, tokenizer, folder / "reviews")


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what an artefact says of itself, and sign it again."""
    file = directory / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    sign(directory)


def _train(network: nn.Module, steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate)
    x, y = images(96)
    network.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
