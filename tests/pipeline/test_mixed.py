"""``compress sensitivity --latency_ms``: each layer in integers and in floats, the best of them within a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import compress.cli
from compress.errors import RecipeError, RunError
from compress.measure.reporting.mixed import mixed_svg, save_mixed
from compress.measure.reporting.report import read_report, write_report
from compress.measure.reporting.results import Mixed
from compress.pipeline import Deadline, mixed, open_run
from compress.pipeline.judging import judge, validation
from compress.pipeline.mixed import _choose, _training_inputs, read_mixed, with_floats
from compress.quantize import calibrate, prepare
from compress.quantize.layers import make_assignment
from compress.quantize.training.progressive import quantizers
from tests.measure.samples import sample_report
from tests.pipeline.test_sensitivity import WORDS

GIVEN = [*WORDS, "--quantize", "{scheme: int8, start: 0.5, keep: [stem.*, stages.0.*]}", "--prune", "null"]


def values(loss: float, ms: float) -> dict[str, float]:
    return {"loss": loss, "accuracy": 0.5, "ms": ms}


EXAMPLE = Mixed(
    stage="baseline",
    metric="accuracy",
    engine="onnxruntime",
    batch=1,
    threads=None,
    measured_on="",
    floats=values(1.0, 20.0),
    integers=values(1.5, 8.0),
    layers={"a": values(1.4, 10.0), "b": values(1.2, 12.0), "c": values(1.45, 9.0), "d": values(1.6, 7.5)},
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "run"
    words = ["sensitivity", "digits", "--run_dir", str(path), *GIVEN]
    assert compress.cli.main([*words, "--latency_ms", "10000", "--threads", "1"]) == 0
    return path


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "run"))


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "mixed.json").read_text())


def test_every_layer_in_integers_is_measured_in_floats(measured: Path) -> None:
    result = read_mixed(open_run(measured))
    assert result is not None
    assert "stages.0.0.conv1" not in result.layers  # the recipe keeps it in floats anyway
    assert {"fc", "stages.1.0.conv1"} < set(result.layers)
    points = [result.floats, result.integers, *result.layers.values()]
    assert all(point["ms"] > 0 and 0 <= point["accuracy"] <= 1 for point in points)
    assert len({point["loss"] for point in points}) > len(points) // 2
    assert result.wanted_ms == 10000.0
    assert (measured / "mixed.png").stat().st_size > 5000


def test_the_same_command_goes_on_and_chooses_within_the_time(run: Path) -> None:
    """Times as no machine has them: a millisecond more for each layer in floats, and a slow network in floats."""
    known = read(run)
    known["floats"]["ms"] = 100000.0
    for values in known["layers"].values():
        values["ms"] = known["integers"]["ms"] + 1000.0
    missing = known["layers"].pop("fc")
    gains = {layer: known["integers"]["loss"] - values["loss"] for layer, values in known["layers"].items()}
    (run / "mixed.json").write_text(json.dumps(known))
    wanted = str(known["integers"]["ms"] + 2500.0)
    assert compress.cli.main(["sensitivity", str(run), "--latency_ms", wanted, "--threads", "1"]) == 0
    after = read(run)
    assert after["layers"]["fc"]["loss"] == missing["loss"]  # measured again, the same; the others were kept
    assert {layer: after["layers"][layer] for layer in known["layers"]} == known["layers"]
    chosen = set(after["chosen"]) - {"fc"}
    best = sorted((gain for gain in gains.values() if gain > 0), reverse=True)[:2]
    assert sorted((gains[layer] for layer in chosen), reverse=True) == best
    layers = json.loads((run / "layers.json").read_text())
    assert layers == {"stem.*": "float", "stages.0.*": "float"} | dict.fromkeys(after["chosen"], "float")
    assert after["reached"]["loss"] == judged(run, layers)


def judged(path: Path, layers: dict[str, str]) -> float:
    """Return the loss of the network that a recipe with these layers makes."""
    run = open_run(path)
    loader, num = validation(run)
    prepared = prepare(run.network("baseline")[0], [run.held_out[0][:2]], "int8", layers=layers)
    with pytest.raises(RecipeError):
        quantizers(prepared, list(layers)[-1:])
    calibrate(prepared, _training_inputs(run, 32))
    return judge(run, prepared, islice(loader, num), torch.device("cpu"))["loss"]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (8.0, []),  # d would make room, and nothing that fits in is worth its loss
        (9.0, ["c"]),
        (10.0, ["a"]),
        (12.0, ["b"]),
        (15.0, ["a", "b", "c"]),
        (20.0, ["a", "b", "c", "d"]),
    ],
)
def test_choices_by_hand(wanted: float, chosen: list[str]) -> None:
    found, reached = _choose(EXAMPLE, wanted, additive)
    assert found == chosen
    assert reached["ms"] <= wanted


def additive(layers: Sequence[str]) -> dict[str, float]:
    return values(1.5 - sum(EXAMPLE.gains()[layer] for layer in layers), 8 + sum(EXAMPLE.times()[a] for a in layers))


def test_what_is_slower_than_its_layers_say_is_chosen_anew() -> None:
    tried = []

    def slower(layers: Sequence[str]) -> dict[str, float]:
        tried.append(list(layers))
        return additive(layers) | {"ms": 8 + 1.3 * sum(EXAMPLE.times()[layer] for layer in layers)}

    found, reached = _choose(EXAMPLE, 15.0, slower)
    assert tried[0] == ["a", "b", "c"]
    assert found == tried[-1] == ["b", "c"]
    assert reached["ms"] == pytest.approx(8 + 1.3 * 5)


def test_a_time_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(RecipeError, match=r"expected at least 7\.5, every layer in its faster form, got 7"):
        _choose(EXAMPLE, 7.0, additive)
    with pytest.raises(RecipeError, match="do not add up"):
        _choose(EXAMPLE, 7.6, lambda layers: values(1.0, 7.7))


@pytest.mark.parametrize("wanted", [6.0, 7.2])
def test_floats_that_are_fast_enough_are_taken_where_integers_are_not(wanted: float) -> None:
    slow = replace(EXAMPLE, floats=values(1.51, 6.0))
    found, reached = _choose(slow, wanted, additive)
    assert (found, reached) == (["a", "b", "c", "d"], slow.floats)
    layers = {"a": values(1.4, 9.0), "b": values(1.3, 9.0)}
    both = replace(EXAMPLE, floats=values(1.51, 8.5), layers=layers)  # nothing that is chosen keeps to its time
    found, reached = _choose(both, 9.0, lambda layers: values(1.0, 9.5))
    assert reached["ms"] <= 9.0


def test_a_choice_that_saves_less_than_it_says_is_followed_by_one_that_saves_more() -> None:
    faster = replace(EXAMPLE, integers=values(1.5, 10.0), floats=values(1.0, 30.0))
    layers = {"a": values(0.5, 9.0), "b": values(1.6, 8.0), "c": values(1.5, 20.0)}
    times = {("a",): 10.2, ("a", "b"): 7.5}
    for wanted in (10.0, 10.1):
        found, _ = _choose(replace(faster, layers=layers), wanted, lambda own: values(1.0, times[tuple(own)]))
        assert found == ["a", "b"]


def test_floats_come_after_the_patterns_that_would_match_their_names() -> None:
    own = {"fc": "w4a8", "*": "int8"}
    layers = with_floats(own, ["fc"], "float")
    assert make_assignment("int8", layers=layers).resolve(["stem", "fc"])["fc"].name == "float"


def test_one_layer_in_floats_is_the_network_in_floats(run: Path) -> None:
    """All others are kept in floats by the recipe; ``eager`` has the threads that are asked for."""
    (run / "layers.json").write_text('{"fc": "w4a8"}')
    threads: list[int] = []
    measure = mixed.measure_latency

    def counted(*given: Any, **more: Any) -> Any:
        threads.append(torch.get_num_threads())
        return measure(*given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "measure_latency", counted)
        before = torch.get_num_threads()
        words = ["--latency_ms", "10000", "--engine", "eager", "--threads", str(before + 1)]
        words += ["--quantize.keep", "[stem.*, stages.*]"]
        assert compress.cli.main(["sensitivity", str(run), *words]) == 0
    assert set(threads) == {before + 1}
    result = read_mixed(open_run(run))
    assert result is not None
    assert list(result.layers) == ["fc"]
    assert result.layers["fc"]["loss"] == result.floats["loss"]
    if result.reached == result.floats:
        assert not (run / "layers.json").exists()


def test_deadlines() -> None:
    assert Deadline(latency=0.5).milliseconds(30.0) == 15.0
    assert Deadline(latency_ms=0.5).milliseconds(30.0) == 0.5
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({}, "one of latency_ms and latency, got 0"),
        ({"latency_ms": 1.0, "latency": 1.0}, "got 2"),
        ({"latency": 0.0}, "latency: expected a positive number"),
        ({"latency_ms": 1.0, "engine": "magic"}, "engine: expected one of eager"),
        ({"latency_ms": 1.0, "engine": "tensorrt"}, "engine: expected one of eager"),
        ({"latency_ms": 1.0, "batch": 0}, "batch: expected at least 1"),
        ({"latency_ms": 1.0, "threads": 0}, "threads: expected at least 1"),
    ]
    for given, message in mistakes:
        with pytest.raises(RecipeError, match=message):
            Deadline(**given)


def test_targets_that_do_not_go_together(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sensitivity", str(run), "--latency", "0.5"]
    assert compress.cli.main([*words, "--average_bits", "4"]) == 2
    assert "average_bits: expected none beside a latency" in capsys.readouterr().err
    assert compress.cli.main([*words, "--quantize.scheme", "int8_dynamic", "--export.targets", "[eager]"]) == 2
    assert "engine: expected engines that run the scheme 'int8_dynamic'" in capsys.readouterr().err
    assert compress.cli.main([*words, "--quantize", "null"]) == 2
    assert "expected a recipe that quantises" in capsys.readouterr().err


def test_another_file_is_refused(run: Path) -> None:
    (run / "mixed.json").write_text("[]")
    with pytest.raises(RunError, match="expected a measurement of this version"):
        read_mixed(open_run(run))


def test_pictures_and_the_report(tmp_path: Path) -> None:
    chosen = replace(EXAMPLE, wanted_ms=12.0, chosen=["b"], reached=values(1.2, 12.0))
    assert [path.name for path in save_mixed(chosen, tmp_path)] == ["mixed.png", "mixed.svg"]
    assert all(f">{layer}<" in mixed_svg(chosen) for layer in "abcd")
    assert save_mixed(replace(EXAMPLE, layers={}), tmp_path) == []
    report = replace(sample_report(), mixed=chosen)
    write_report(report, tmp_path)
    assert read_report(tmp_path).mixed == chosen
    page = (tmp_path / "report.html").read_text()
    assert "Integers or floats, layer by layer" in page
    assert "12.0 ms" in page
    write_report(replace(report, mixed=EXAMPLE), tmp_path)
    assert "were asked for" not in (tmp_path / "report.html").read_text()
    many = {f"layer{number}": values(1.0, 8.0 + number) for number in range(40)}
    svg = mixed_svg(replace(EXAMPLE, layers=many))
    assert "layer39" in svg
    assert ">layer2<" not in svg


def test_what_was_interrupted_is_gone_on_with_within_the_same_time(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    known = read(run)
    known["layers"].popitem()
    (run / "mixed.json").write_text(json.dumps(known))
    monkeypatch.setattr("compress.pipeline.mixed.measure_latency", interrupt)
    given = "--latency_ms 2.5 --engine onnxruntime --batch 1 --threads 1"
    assert compress.cli.main(["sensitivity", str(run), *given.split()]) == 130
    assert capsys.readouterr().err.strip().endswith(f"Go on with: compress sensitivity {run} {given}")
    assert read(run) == known
