"""What a teacher adds to a training step: live, in bfloat16, from a cache, with feature taps; and what Lightning adds.

All variants fit the same student on the same batches in one process, a few steps at a time in turn. Times are of whole
steps, from the begin of one batch to the begin of the next, data loading and logging included.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from common import Row, finish, options
from pytorch_lightning.callbacks import Callback
from rich.progress import track
from torch.nn import functional as F

from compress.data import ArrayDataModule, ImageSplit, ImageSplits
from compress.distill import AttentionTransfer, Classification, Distiller, LiveTeacher, SoftTarget, freeze, soft_target
from compress.distill.cache import CacheWriter, Field, OutputCache
from compress.measure.memory import peak_memory
from compress.models import ResNet

BATCH, SKIPPED = 128, 2


class RandomImages(ArrayDataModule):
    """Images (1, 28, 28) of noise: only time counts."""

    def __init__(self, num: int = 8 * BATCH) -> None:
        super().__init__(batch_size=BATCH, flip=True)
        self.num = num

    def load(self) -> ImageSplits:
        """Return the same images as all three splits."""
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (self.num, 28, 28), dtype=np.uint8)
        split = ImageSplit(images, random.integers(0, 10, self.num))
        return ImageSplits(split, split, split, [str(digit) for digit in range(10)])


class StepTimes(Callback):
    """Times from the begin of one step to the begin of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None
        self._count = 0

    def on_train_start(self, *_: Any) -> None:
        """Begin anew."""
        self._last, self._count = None, 0

    def on_train_batch_start(self, *_: Any) -> None:
        """Take the time."""
        now = time.perf_counter()
        if self._last is not None and self._count > SKIPPED:
            self.seconds.append(now - self._last)
        self._last, self._count = now, self._count + 1


def main() -> None:
    arguments = options(__doc__ or "")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    rounds = 4 if arguments.quick else 24
    with tempfile.TemporaryDirectory() as folder:
        cache = _store(Path(folder))
        variants = {name: _lightning(name, cache) for name in ("student", "live", "live_bf16", "features", "cached")}
        if not arguments.quick:
            variants["live_bf16_compiled"] = _lightning("live_bf16_compiled", cache)
        variants["plain_loop"] = _plain()
        variants["teacher_forward"] = _teacher_forward()
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in track(range(rounds + 1), description="measuring steps"):
            for name, run in variants.items():
                seconds = run()
                times[name] += seconds if number else []  # the first round warms up
        reads = _reads(Path(folder) / "many")
        memory = _memory(folder, rounds=1 if arguments.quick else 5)
    step = {name: median(values) for name, values in times.items()}
    rows = [Row("student", "step", step["student"] * 1e3, "ms")]
    rows += [Row(name, "step_ratio", step[name] / step["student"], "ratio") for name in variants if name != "student"]
    whole = step["student"] + step["teacher_forward"]
    rows += [
        Row("live", "step / (student + teacher forward)", step["live"] / whole, "ratio"),
        Row("features", "step / live", step["features"] / step["live"], "ratio"),
        Row("student", "step / plain_loop", step["student"] / step["plain_loop"], "ratio"),
        Row("live", "memory_ratio", memory["live"] / memory["student"], "ratio"),
        Row("cached", "memory_ratio", memory["cached"] / memory["student"], "ratio"),
        Row("cached_reads", "batches of 128 at random", reads, "samples/s"),
    ]
    finish(arguments, rows)


def _memory(folder: str, *, rounds: int) -> dict[str, float]:
    found: dict[str, list[int]] = {"student": [], "live": [], "cached": []}
    for _ in track(range(rounds), description="measuring memory"):
        for name, values in found.items():
            values.append(peak_memory("distill_step:fit_once", name, folder))
    return {name: median(values) for name, values in found.items()}


def fit_once(name: str, folder: str) -> Callable[[], object]:
    """Return a few steps of a variant, for a fresh process in which memory is measured."""
    return _lightning(name, OutputCache.open(Path(folder), key={}))


def _student() -> ResNet:
    torch.manual_seed(0)
    return ResNet(in_channels=1, width=16, blocks=(1, 1, 1))


def _teacher() -> ResNet:
    torch.manual_seed(1)
    return ResNet(in_channels=1, width=32, blocks=(2, 2, 2))


def _lightning(name: str, cache: OutputCache) -> Callable[[], list[float]]:
    losses: list[Any] = [SoftTarget(weight=0.9)]
    teacher: Any = None
    if name == "cached":
        teacher = cache
    elif name != "student":
        precision = "bf16" if "bf16" in name else None
        teacher = LiveTeacher(_teacher(), precision=precision, compile="compiled" in name, channels_last=True)
    if name == "features":
        losses.append(AttentionTransfer({"stages.1": "stages.1", "stages.2": "stages.2"}))
    module = Distiller(
        _student(),
        task=Classification(10),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        teacher=teacher,
        losses=losses if teacher is not None else (),
        channels_last=True,
    )
    data, times = RandomImages(), StepTimes()

    def steps() -> list[float]:
        times.seconds.clear()
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=[times],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=data)
        return list(times.seconds)

    return steps


def _plain() -> Callable[[], list[float]]:
    """The student alone, in a loop as one would write it without any library."""
    student = _student().train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    data = RandomImages()

    def steps() -> list[float]:
        seconds: list[float] = []
        last: float | None = None
        for count, (x, y, _) in enumerate(data.train_dataloader()):
            now = time.perf_counter()
            if last is not None and count > SKIPPED:
                seconds.append(now - last)
            last = now
            optimizer.zero_grad()
            loss = F.cross_entropy(student(x.contiguous(memory_format=torch.channels_last)), y)
            loss.backward()
            optimizer.step()
        return seconds

    return steps


def _teacher_forward() -> Callable[[], list[float]]:
    teacher = freeze(_teacher()).to(memory_format=torch.channels_last)
    student = _student().eval()
    x = torch.randn(BATCH, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        answers = student(x)

    def steps() -> list[float]:
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            with torch.no_grad():
                soft_target(answers, teacher(x))
            seconds.append(time.perf_counter() - start)
        return seconds[SKIPPED:]

    return steps


def _store(folder: Path) -> OutputCache:
    _fill(folder, RandomImages().num, 10)
    return OutputCache.open(folder, key={})


def _fill(folder: Path, num: int, classes: int) -> None:
    writer = CacheWriter(folder, key={}, fields={"outputs": Field((classes,))}, num_samples=num)
    for view, start, stop in writer.missing():
        writer.write(view, start, {"outputs": torch.randn(stop - start, classes)})
    writer.finish()


def _reads(folder: Path, num: int = 100_000, classes: int = 100) -> float:
    """Return how many samples a second are read at random, one process, in batches."""
    _fill(folder, num, classes)
    cache = OutputCache.open(folder, key={})
    order = torch.randperm(num)
    views = torch.zeros(BATCH, dtype=torch.int64)
    start = time.perf_counter()
    for first in range(0, num - BATCH, BATCH):
        cache.read(order[first : first + BATCH], views)
    return (num - BATCH) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
