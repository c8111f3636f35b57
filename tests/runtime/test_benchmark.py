"""What a benchmark of engines measures, and what it leaves as it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ArtifactError
from compress.measure.reporting.engines import engines_failed
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


def test_an_engine_that_cannot_be_loaded_with_so_many_threads_has_rows_with_the_reason() -> None:
    def make(name: str, threads: int | None = None) -> Sleeper:
        if name == "a" and threads == 2:
            raise RuntimeError("one thread is all there is")
        return Sleeper(threads or 1)

    engines = {"a": Sleeper(1), "b": Sleeper(1)}
    model = CompactModel(_FREE, engines, make, engines=["a", "b"], serves={1: "a", 4: "b"})
    rows = model.benchmark((1, 4), threads=[1, 2], seconds=0.01)
    reason = "with 2 threads: RuntimeError: one thread is all there is"
    assert [(row["engine"], row["batch"], row["threads"], row["reason"]) for row in rows if row["reason"]] == [
        ("a", 1, 2, reason),
        ("a", 4, 2, reason),
    ]
    assert sum(row["p50_ms"] is not None for row in rows) == 6
    assert engines_failed(rows) == [f"a did not run {reason}"]


def test_an_engine_that_keeps_its_threads_is_measured_once() -> None:
    rows = sleeping(told=False)[0].benchmark((1,), threads=[1, 2], seconds=0.01)
    assert [(row["engine"], row["threads"]) for row in rows] == [("a", 3)]


def test_an_engine_that_does_not_run_a_batch_has_a_row_with_the_reason() -> None:
    class Narrow(Sleeper):
        def __call__(self, inputs: Sequence[Any]) -> list[Any]:
            if len(inputs[0]) > 32:
                raise MemoryError("no room")
            return super().__call__(inputs)

    runs = {"a": Sleeper(3), "narrow": Narrow(3)}
    model = CompactModel(_FREE, runs, lambda name, threads=None: runs[name], engines=["a", "narrow"], serves={1: "a"})
    rows = model.benchmark((1, 64), seconds=0.01)
    assert [(row["batch"], row["engine"]) for row in rows] == [(1, "a"), (1, "narrow"), (64, "a"), (64, "narrow")]
    assert [row["reason"] for row in rows] == [None, None, None, "a batch of 64: MemoryError: no room"]
    assert all(row["p50_ms"] > 0 for row in rows[:3])
    assert rows[3] | {"p50_ms": None, "p95_ms": None, "samples_per_second": None} == rows[3]
    runs["a"] = runs["narrow"]
    assert [row["p50_ms"] for row in model.benchmark((64,), threads=[1], seconds=0.01)] == [None, None]


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
        ({"threads": (0,)}, "threads: expected numbers of at least 1 and at most .*, got 0"),
        ({"threads": (2, 10**4)}, "threads: expected numbers of at least 1 and at most .*, got 10000"),
        ({"threads": (2, 2)}, "threads: expected different numbers, got 2, 2"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    model, asked = sleeping(told=True)
    with pytest.raises(ArtifactError, match=message):
        model.benchmark(**arguments)
    assert not asked
