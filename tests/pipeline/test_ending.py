"""What happens to a network after the last step of a run: averages, post-training quantization, a stop amid them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from rich.console import Console
from torch import Tensor

from compress.data import Digits
from compress.distill import Classification
from compress.errors import ExportError
from compress.models import ResNet
from compress.pipeline import create_run, export, fit
from compress.pipeline.rundir import RunDirectory
from compress.quantize import QuantizationAwareTraining, calibrate, convert, prepare
from compress.quantize.layers import make_assignment
from compress.recipe import Export, Recipe
from compress.surgery.capture import export_program

callback: Any = importlib.import_module("compress.quantize.callback")


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=1, annealing_epochs=1),
}


def start(path: Path, *, average: str | None = None, **quantize: Any) -> RunDirectory:
    torch.manual_seed(0)
    recipe = Recipe(
        name="ending",
        data=Digits(batch_size=256),
        task=Classification(10),
        student=ResNet(in_channels=1, width=4, blocks=(1,), num_classes=10),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        quantize=QuantizationAwareTraining("int8", **quantize),
        export=Export(targets=["eager"], min_top1_agreement=0.9, min_int8_fraction=0),
        baseline=False,
        trainer={
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [AVERAGES[average]()] if average else [],
        },
    )
    return create_run(recipe, path=path, console=Console(quiet=True))


def final(run: RunDirectory) -> dict[str, Tensor]:
    return torch.load(run.snapshot("final"), weights_only=True)["state_dict"]


def settings(average: str | None) -> dict[str, Any]:
    if average:
        return {"start": 1, "improve": ["equalize", "bias"], "average": average, "ranges": "minmax"}
    return {"start": 1, "improve": ["equalize", "adaround"], "num_batches": 2}  # adaround takes most of the time


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run that averages weights."""
    run = start(tmp_path_factory.mktemp("averaged") / "run", **settings("ema"))
    fit(run)
    return run


@pytest.mark.parametrize("average", [None, "ema", pytest.param("swa", marks=pytest.mark.slow)])
def test_a_run_that_dies_in_calibration_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: str | None, request: pytest.FixtureRequest
) -> None:
    if average == "ema":
        whole = request.getfixturevalue("averaged")
    else:
        whole = start(tmp_path / "whole", **settings(average))
        fit(whole)
    stopped = start(tmp_path / "stopped", **settings(average))
    with monkeypatch.context() as patch:
        patch.setattr(callback, "calibrate", die)
        with pytest.raises(MemoryError):
            fit(stopped)
    assert not stopped.snapshot("final").exists()
    fit(stopped)
    expected, got = final(whole), final(stopped)
    assert any("activation_post_process" in name for name in expected)  # it was quantised
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def die(*_: Any, **__: Any) -> None:
    raise MemoryError


def test_what_is_quantised_after_training_is_the_average(averaged: RunDirectory, tmp_path: Path) -> None:
    run = averaged
    network, _ = run.network("final")
    x = run.held_out[0]
    with torch.no_grad():
        wanted, got = network.eval()(x), run.deployed(x)
    assert float((wanted.argmax(1) == got.argmax(1)).float().mean()) > 0.97
    # Equalised, and with biases corrected: had the average come after, neither would be left.
    plain = start(tmp_path / "plain", average="ema", start=1, ranges="minmax")
    fit(plain)
    ours, theirs = final(run), final(plain)
    assert ours.keys() == theirs.keys()
    weights = [name for name in ours if name.endswith("weight")]
    assert any(not torch.equal(ours[name], theirs[name]) for name in weights)


def test_a_run_that_ends_before_its_quantization_says_so(tmp_path: Path) -> None:
    run = start(tmp_path / "run", start=0.99, freeze_batchnorm=1)
    with pytest.warns(UserWarning, match=r"quantize\.start: expected training to go beyond 0\.99 .*in floats"):
        fit(run)
    with pytest.raises(ExportError, match=r"got one in floats: training ended before progress 0\.99, quantize\.start"):
        export(run)
    assert not (tmp_path / "run" / "artifact").exists()


def test_of_a_few_layers_in_integers_the_gate_asks_for_those() -> None:
    gate = importlib.import_module("compress.pipeline.export")._gate
    network, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), torch.randn(4, 8)
    assignment = make_assignment("float", layers={"1": "int8"})
    prepared = prepare(network.eval(), [x], assignment)
    calibrate(prepared, [(x,)])
    program = export_program(convert(prepared), [x])
    assert gate(assignment, program, 0.5) == pytest.approx(0.5 * 16 / 80)
    assert gate(make_assignment("int8", layers={"0": "float"}), program, 0.5) == 0.5
    assert gate(None, program, 0.5) == 0


@pytest.mark.parametrize(("scheme", "asked"), [("int8", 0.5), ("float", 0.5), ("fp8", 0)])
def test_the_gate_of_integers_holds_where_any_layer_has_kernels_and_is_not_dropped_in_silence(
    averaged: RunDirectory, monkeypatch: pytest.MonkeyPatch, scheme: str, asked: float
) -> None:
    module, gates = importlib.import_module("compress.pipeline.export"), []

    def refuse(*_: Any, **arguments: Any) -> None:
        gates.append(arguments["gates"].min_int8_fraction)
        raise ExportError("")

    monkeypatch.setattr(module, "export_artifact", refuse)
    monkeypatch.setattr(module, "read_assignment", lambda _: make_assignment(scheme, layers={"fc": "int8"}))
    monkeypatch.setattr(averaged.recipe.export, "min_int8_fraction", 0.5)
    monkeypatch.setattr(averaged.console, "quiet", False)
    with averaged.console.capture() as told, pytest.raises(ExportError):
        export(averaged)
    assert gates == [asked]
    said = "export.min_int8_fraction: 0.5 is not asked of this network. No engine that runs its schemes (fp8, int8)"
    assert (said in told.get()) == (asked == 0)
