from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from math import log
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.runtime import dispatch
from compress.runtime.dispatch import BUCKETS, batch_sizes, choose, measure, picker
from compress.runtime.manifest import Manifest, TensorSpec

ROWS = st.fixed_dictionaries({name: st.floats(0.01, 100) for name in "abc"})
TIMES = st.fixed_dictionaries(dict.fromkeys(BUCKETS, ROWS))


class Sleeping:
    """An engine that takes so many seconds for a call, and so many for each sample of it."""

    takes = "numpy"
    threads = 1

    def __init__(self, call: float, sample: float) -> None:
        self.call, self.sample = call, sample
        self.sizes: set[int] = set()

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        self.sizes.add(len(inputs[0]))
        time.sleep(self.call + self.sample * len(inputs[0]))
        return [np.zeros(1)]


def manifest(largest: int | None = None) -> Manifest:
    spec = TensorSpec("x", "float32", (None, 2))
    return Manifest("sleeping", "", "", (spec,), (spec,), {}, max_batch=largest)


@given(TIMES)
def test_what_serves_is_within_noise_of_the_fastest(times: dict[int, dict[str, float]]) -> None:
    serves = choose(times)
    assert list(serves) == list(times)
    for size, row in times.items():
        assert row[serves[size]] <= 1.03 * min(row.values())


@given(TIMES)
def test_no_fewer_engines_would_do(times: dict[int, dict[str, float]]) -> None:
    serves = choose(times)
    if len(set(serves.values())) > 1:
        for name in "abc":
            assert any(row[name] > 1.03 * min(row.values()) for row in times.values())


@given(st.integers(1, 5000), st.sets(st.integers(1, 64), min_size=1, max_size=5))
def test_a_batch_is_served_as_the_nearest_size_by_ratio(num: int, sizes: set[int]) -> None:
    got = int(picker({size: str(size) for size in sizes})(num))
    assert abs(log(num / got)) <= min(abs(log(num / size)) for size in sizes) + 1e-12


@pytest.mark.parametrize(
    ("largest", "wanted"), [(None, BUCKETS), (64, BUCKETS), (16, (1, 4, 16)), (3, (1, 3)), (1, (1,))]
)
def test_no_batch_is_larger_than_the_files_take(largest: int | None, wanted: tuple[int, ...]) -> None:
    assert batch_sizes(largest) == wanted


def test_each_engine_wins_where_it_is_faster() -> None:
    engines = {"quick": Sleeping(1e-3, 1e-3), "steady": Sleeping(8e-3, 1e-5), "slow": Sleeping(0.02, 1e-3)}
    times, _ = measure(engines, manifest(), seconds=0.2)
    assert tuple(times) == BUCKETS
    assert choose(times)[1] == "quick"
    assert choose(times)[32] == "steady"
    assert all(row["slow"] > min(row.values()) for row in times.values())


def test_batches_that_would_take_too_long_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LONGEST_MS", 70.0)  # of 16, that would take 80
    engine = Sleeping(0.0, 5e-3)
    assert tuple(measure({"a": engine}, manifest(), seconds=0.02)[0]) == (1, 4)
    assert engine.sizes == {1, 4}


def test_of_long_batches_those_that_are_close_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LONG_MS", 45.0)
    engines = {"first": Sleeping(0.0, 5e-3), "later": Sleeping(5e-3, 4e-3), "far": Sleeping(0.02, 5e-3)}
    times, _ = measure(engines, manifest(16), seconds=0.05)
    assert engines["far"].sizes == {1, 4}
    assert engines["first"].sizes == engines["later"].sizes == {1, 4, 16}
    assert choose(times)[16] == "later"
    assert times[16]["far"] / times[16]["later"] == pytest.approx(times[4]["far"] / min(times[4].values()))


class Small(Sleeping):
    """An engine whose memory is too small for large batches."""

    def __init__(self, largest: int) -> None:
        super().__init__(0.0, 0.0)
        self.largest = largest

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        if len(inputs[0]) > self.largest:
            raise MemoryError("no more")
        return super().__call__(inputs)


def test_an_engine_that_fails_at_a_size_is_left_out_of_all() -> None:
    times, reasons = measure({"small": Small(4), "large": Small(99)}, manifest(), seconds=0.02)
    assert {size: list(row) for size, row in times.items()} == {size: ["large"] for size in BUCKETS}
    assert reasons == {"small": "a batch of 16: MemoryError: no more"}


def test_where_the_close_ones_fail_those_far_behind_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Small):
        def __call__(self, inputs: Sequence[Any]) -> list[Any]:
            time.sleep(self.sample * len(inputs[0]))
            return super().__call__(inputs)

    monkeypatch.setattr(dispatch, "_LONG_MS", 10.0)
    engines = {"near": Slow(4), "far": Slow(99)}
    engines["near"].sample, engines["far"].sample = 1e-3, 4e-3
    times, reasons = measure(engines, manifest(16), seconds=0.05)
    assert {size: list(row) for size, row in times.items()} == {size: ["far"] for size in (1, 4, 16)}
    assert list(reasons) == ["near"]
    assert choose(times)[16] == "far"


def test_a_size_that_no_engine_takes_ends_it() -> None:
    times, reasons = measure({"one": Small(4), "other": Small(15)}, manifest(), seconds=0.02)
    assert {size: list(row) for size, row in times.items()} == {1: ["one", "other"], 4: ["one", "other"]}
    assert reasons == {}
    assert measure({"none": Small(0)}, manifest(), seconds=0.02) == ({}, {"none": "a batch of 1: MemoryError: no more"})


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    measure({"quick": Sleeping(0.0, 0.0)}, manifest(1), seconds=0.01)
    assert ("measuring quick" in stream.getvalue()) is terminal
    assert capsys.readouterr().out == ""
