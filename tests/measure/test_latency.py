from __future__ import annotations

import subprocess
import sys
import time

import pytest

from compress.errors import RecipeError
from compress.measure.latency import measure_latency


def test_latency_is_that_of_the_call() -> None:
    measured = measure_latency({"two": lambda: time.sleep(0.002), "eight": lambda: time.sleep(0.008)}, seconds=0.1)
    assert 2.0 <= measured["two"].p50_ms < 6.0
    assert 8.0 <= measured["eight"].p50_ms < 16.0
    assert all(latency.p50_ms <= latency.p95_ms for latency in measured.values())


def test_calls_take_turns_and_the_first_of_a_block_is_not_counted() -> None:
    order: list[str] = []
    measured = measure_latency(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        seconds=1e-9,
        warmup=2,
        block_seconds=1e-9,  # so that a block is as short as it may be
        pause_seconds=0.0,
        min_runs=4,
    )
    assert "".join(order) == "aabb" + "aaabbb" * 2
    assert {latency.num_runs for latency in measured.values()} == {4}


def test_a_slow_start_of_a_block_does_not_show() -> None:
    # As an engine does whose caches another one has emptied.
    last = [""]

    def call(name: str) -> None:
        time.sleep(0.001 if last[0] == name else 0.03)
        last[0] = name

    measured = measure_latency({"a": lambda: call("a"), "b": lambda: call("b")}, seconds=0.01, block_seconds=0.005)
    assert all(latency.p50_ms < 15 for latency in measured.values())


def test_each_call_gets_its_seconds() -> None:
    measured = measure_latency({"quick": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.01)}, seconds=0.3)
    assert measured["quick"].num_runs > 2 * measured["slow"].num_runs >= 40


def test_progress_bar_changes_nothing() -> None:
    assert measure_latency({"a": lambda: None}, seconds=0.01, progress=True)["a"].num_runs >= 20


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_seconds_must_be_positive(seconds: float) -> None:
    with pytest.raises(RecipeError, match="seconds: expected a positive number"):
        measure_latency({"a": lambda: None}, seconds=seconds)


def test_numpy_is_all_that_serving_needs_of_this_room() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'rich', 'matplotlib', 'jinja2']))\n"
        "import compress.measure, compress.measure.latency, compress.measure.agreement, compress.measure.machine\n"
        "print(compress.measure.measure_latency({'a': int}, seconds=0.01)['a'].num_runs >= 20)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
