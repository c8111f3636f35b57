"""``compress sensitivity`` of a recipe that quantises: each layer's loss at few bits, gone on with, bits shared out."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress.cli
from compress.errors import RunError
from compress.measure.reporting.bits import bits_svg
from compress.measure.reporting.report import read_report, write_report
from compress.measure.reporting.results import Bits
from compress.pipeline import open_run
from compress.pipeline.bits import _is_plain, read_bits
from compress.pipeline.judging import judge, validation
from compress.quantize import QuantizationAwareTraining
from compress.quantize.sensitivity import num_weights, rounded
from compress.quantize.training.progressive import Stages
from compress.recipe import build_recipe, find_recipe, parse_recipe
from tests.measure.samples import sample_report
from tests.pipeline.test_sensitivity import WORDS, call

step: Any = importlib.import_module("compress.pipeline.bits")
GIVEN = [*WORDS, "--quantize", "{scheme: int8, start: 0.5}", "--prune", "null"]


class Written(nn.Module):
    """A product that is no layer, and one whose weights a parametrization computes."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(64, 8) / 8)
        self.fc = nn.Linear(8, 10)
        self.branches = branches
        if not branches:
            nn.utils.parametrizations.weight_norm(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() > 1e9:
            x = -x
        return self.fc(x.flatten(1) @ self.mixing)


class Recurrent(nn.Module):
    """No graph can be captured of it, and without one its LSTM stays in floats."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = -x
        return self.fc(self.lstm(x.flatten(1, 2))[0][:, -1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bits") / "run"
    words = ["--bits", "8", "2", "--average_bits", "5", "--run_dir", str(path)]
    assert compress.cli.main(["sensitivity", "digits", *words, *GIVEN]) == 0
    return path


def test_each_point_is_the_network_with_that_layer_rounded(measured: Path) -> None:
    run = open_run(measured)
    bits = read_bits(run)
    assert bits is not None
    network = run.network("baseline")[0].eval()
    assert bits.sizes == num_weights(network)
    assert list(bits.curves) == list(bits.sizes)
    assert all([num for num, _ in points] == [8, 2] for points in bits.curves.values())
    loader, _ = validation(run)
    cpu = torch.device("cpu")
    assert judge(run, network, loader, cpu) == bits.whole
    layer = list(bits.curves)[1]
    before = network.get_parameter(f"{layer}.weight").clone()
    with rounded(network, layer, 2):
        assert len(network.get_parameter(f"{layer}.weight")[0].unique()) <= 4
        assert judge(run, network, loader, cpu) == bits.curves[layer][1][1]
    assert torch.equal(network.get_parameter(f"{layer}.weight"), before)
    assert all(abs(of_layer[8]) < 0.02 < max(map(abs, of_layer.values())) for of_layer in [bits.losses()[layer]])


def test_bits_are_shared_out_within_the_target(measured: Path) -> None:
    bits = read_bits(open_run(measured))
    assert bits is not None
    spent = sum(bits.sizes[layer] * num for layer, num in bits.chosen.items())
    assert spent <= 5 * sum(bits.sizes.values())
    assert set(bits.chosen.values()) == {8, 2}
    assert (measured / "bits.png").stat().st_size > 5000
    svg = bits_svg(bits)
    assert all(layer in svg for layer in bits.sizes)


def test_what_was_shared_out_is_what_a_recipe_takes(measured: Path) -> None:
    bits = read_bits(open_run(measured))
    assert bits is not None
    words = (measured / "layers.json").read_text()
    given = parse_recipe(find_recipe("digits"), [*GIVEN, "--quantize.layers", words])
    callback = build_recipe(*given, name="digits").quantize
    assert callback is not None
    found = {pattern: scheme.weight_bits for pattern, scheme in callback.assignment.layers.items()}
    assert found == bits.chosen


def test_layers_are_not_written_for_another_kind_of_scheme(measured: Path) -> None:
    run = open_run(measured)
    assert _is_plain(run)
    for scheme, plain in (("w4a8", True), ("int8_portable", False), ("int8_weights", False)):
        run.recipe.quantize = QuantizationAwareTraining(scheme)
        assert _is_plain(run) == plain


def test_layers_get_bits_that_this_call_asks_for(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(measured, tmp_path / "run"))
    code, _, err = call(capsys, "sensitivity", path, "--bits", "8", "--average_bits", "5")
    assert code == 2
    assert "average_bits: expected at least 8, all layers at their fewest bits, got 5" in err
    assert call(capsys, "sensitivity", path, "--bits", "8", "4", "--average_bits", "5")[0] == 0
    bits = read_bits(open_run(path))
    assert bits is not None
    assert set(bits.chosen.values()) == {8, 4}
    assert all([num for num, _ in points] == [8, 4, 2] for points in bits.curves.values())
    order = json.loads((path / "order.json").read_text())
    assert order == sorted(order, key=lambda layer: bits.losses()[layer][4])


def test_the_order_of_layers_is_what_a_recipe_takes(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(measured, tmp_path / "run"))
    bits = read_bits(open_run(path))
    assert bits is not None
    text = (path / "order.json").read_text()
    order = json.loads(text)
    assert set(order) == set(bits.sizes)
    assert order == sorted(order, key=lambda layer: bits.losses()[layer][2])
    stages = ["--quantize", "{scheme: w4a8, start: 0.5, progressive: {bits: [8, 4], at: [0.5, 0.75]}}"]
    given = parse_recipe(find_recipe("digits"), [*GIVEN, *stages, "--quantize.progressive.order", text])
    callback = build_recipe(*given, name="digits").quantize
    assert callback is not None
    assert isinstance(callback.progressive, Stages)
    assert callback.progressive.order == order
    code, out, _ = call(capsys, "sensitivity", path, "--bits", "8", "2", "--quantize.keep", "[stem.0]")
    assert code == 0
    assert f'--quantize.progressive.order "$(cat {path}/order.json)"' in out
    # A layer whose factors are floats may not stand there.
    assert json.loads((path / "order.json").read_text()) == [layer for layer in order if layer != "stem.0"]


@pytest.mark.parametrize("branches", [False, True])
def test_layers_are_those_that_the_recipe_quantises(
    tmp_path: Path, branches: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    student = f"{{class_path: tests.pipeline.test_bits.Written, init_args: {{branches: {json.dumps(branches)}}}}}"
    words = ["--student", student, *GIVEN[GIVEN.index("--trainer.max_epochs") : GIVEN.index("--prune.ignore")]]
    words += ["--quantize", f"{{start: 0.5, fallback: {'parametrize' if branches else 'null'}}}", "--prune", "null"]
    words += ["--bits", "2", "--average_bits", "2", "--run_dir", str(tmp_path / "run")]
    assert call(capsys, "sensitivity", "digits", *words)[0] == 0
    run = open_run(tmp_path / "run")
    bits = read_bits(run)
    assert bits is not None
    assert bits.sizes == ({"fc": 80} if branches else {"": 512, "fc": 80})
    assert all(points[0][1] != bits.whole for points in bits.curves.values())
    layers, order = (json.loads((run.path / f"{name}.json").read_text()) for name in ("layers", "order"))
    assert set(layers) == set(order) == set(bits.sizes)
    callback = QuantizationAwareTraining(layers=layers, fallback="parametrize" if branches else None)
    callback.rehearse(run.network("baseline")[0], [torch.randn(2, 1, 8, 8)])


def test_what_stays_in_floats_has_no_part_in_the_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--student", "{class_path: tests.pipeline.test_bits.Recurrent}", "--prune", "null"]
    words += GIVEN[GIVEN.index("--trainer.max_epochs") : GIVEN.index("--prune.ignore")]
    words += ["--quantize", "{start: 0.5, fallback: parametrize}", "--bits", "4", "--average_bits", "4"]
    assert call(capsys, "sensitivity", "digits", *words, "--run_dir", str(tmp_path / "run"))[0] == 0
    run = open_run(tmp_path / "run")
    bits = read_bits(run)
    assert bits is not None
    assert set(bits.curves) == {"lstm", "fc"}
    layers = json.loads((run.path / "layers.json").read_text())
    assert layers == {"fc": "w4a8"}
    callback = QuantizationAwareTraining(layers=layers, fallback="parametrize")
    callback.rehearse(run.network("baseline")[0], [torch.randn(2, 1, 8, 8)])


def test_what_was_interrupted_is_gone_on_with_for_the_same_bits(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    path = Path(shutil.copytree(measured, tmp_path / "run"))
    monkeypatch.setattr(step, "judge", interrupt)
    given = "--ratios 0.5 --bits 8 3 --average_bits 4.5"
    code, _, err = call(capsys, "sensitivity", path, "--average_bits", "4.5", "--bits", "8", "3", "--ratios", "0.5")
    assert code == 130
    assert err.endswith(f"Go on with: compress sensitivity {path} {given}")


def test_what_was_stopped_goes_on(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = measured / "bits.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"curves": dict(list(whole["curves"].items())[:-1])}))
    judged: list[int] = []

    def counted(*given: Any) -> dict[str, float]:
        judged.append(1)
        return judge(*given)

    monkeypatch.setattr(step, "save_bits", lambda *_: [])
    monkeypatch.setattr(step, "judge", counted)
    assert compress.cli.main(["sensitivity", str(measured), "--bits", "8", "2", "--average_bits", "5"]) == 0
    assert len(judged) == 2
    assert json.loads(path.read_text()) == whole
    path.write_text("{}")
    with pytest.raises(RunError, match="expected a measurement of this version"):
        read_bits(open_run(measured))
    path.write_text(json.dumps(whole))


def test_the_report_has_a_picture_of_the_most_sensitive_layers(tmp_path: Path) -> None:
    curves = {f"layer{n}": [[8, {"loss": 1.0, "f1": 0.9}], [2, {"loss": 1.0 + n, "f1": 0.5}]] for n in range(20)}
    bits = Bits("baseline", "f1", "", {"loss": 1.0, "f1": 0.9}, dict.fromkeys(curves, 10), curves)  # type: ignore[arg-type]
    svg = bits_svg(bits)
    assert [layer for layer in curves if f">{layer}<" in svg] == [f"layer{n}" for n in range(8, 20)]
    assert bits_svg(Bits("baseline", "f1", "", {}, {}, {})) == ""
    page = write_report(replace(sample_report(), bits=bits), tmp_path)
    assert "Bits of the layers" in Path(page).read_text()
    assert read_report(tmp_path).bits == bits
