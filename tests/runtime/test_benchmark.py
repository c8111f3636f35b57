"""What a benchmark of engines measures, and what it leaves as it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ArtifactError
from compress.runtime import CompactModel, load
from compress.runtime.manifest import Manifest, TensorSpec
from tests.export.programs import artifact

_FREE = Manifest("m", "", "", (TensorSpec("x", "float32", (None, 2)),), (), {}, max_batch=64)


class Sleeper:
    """Takes a millisecond for each sample, divided by its threads."""

    takes = "numpy"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        time.sleep(1e-3 * len(inputs[0]) / self.threads)
        return [np.zeros(len(inputs[0]))]


def sleeping(*, told: bool) -> tuple[CompactModel, list[int | None]]:
    """Return a model, and the numbers of threads with which its engine is loaded; it may not do as it is told."""
    asked: list[int | None] = []

    def make(name: str, threads: int | None = None) -> Sleeper:
        asked.append(threads)
        return Sleeper(threads if told and threads else 3)

    return CompactModel(_FREE, {"a": Sleeper(3)}, make, engines=["a"], serves={1: "a"}), asked


def test_rows_hold_every_batch_size_and_number_of_threads() -> None:
    model, asked = sleeping(told=True)
    rows = model.benchmark((1, 4), threads=[1, 2], seconds=0.01)
    assert [(row["threads"], row["batch"]) for row in rows] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert asked == [1, 2, 3]  # the last for the process, whose threads were those of the engine that serves
    for row in rows:
        wanted = row["batch"] / row["threads"]
        assert wanted <= row["p50_ms"] <= row["p95_ms"]
        assert row["samples_per_second"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"])


def test_an_engine_that_keeps_its_threads_is_measured_once() -> None:
    rows = sleeping(told=False)[0].benchmark((1,), threads=[1, 2], seconds=0.01)
    assert [(row["engine"], row["threads"]) for row in rows] == [("a", 3)]


def test_torch_has_its_threads_back() -> None:
    before = torch.get_num_threads()
    rows = load(artifact(), engine="eager").benchmark((1,), threads=[before + 1], seconds=0.01)
    assert [row["threads"] for row in rows] == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": (0,)}, "batch_sizes: expected numbers of at least 1 and at most 64, got 0"),
        ({"batch_sizes": (65,)}, "at most 64, got 65"),
        ({"threads": (0,)}, "threads: expected numbers of at least 1, got 0"),
        ({"threads": (2, 2)}, "threads: expected different numbers, got 2, 2"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    model, asked = sleeping(told=True)
    with pytest.raises(ArtifactError, match=message):
        model.benchmark(**arguments)
    assert not asked
