"""``compress sensitivity`` on the embedded digits: measured once, gone on with, refused when stale, in the report."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import compress.cli
from compress.errors import RunError
from compress.pipeline import open_run, report
from compress.pipeline.report import _target
from compress.pipeline.rundir import RunDirectory
from compress.pipeline.sensitivity import read_sensitivity
from compress.surgery import Edit, History

step: Any = importlib.import_module("compress.pipeline.sensitivity")  # the function has the name of its file

WORDS = ["--student.init_args.width", "4", "--student.init_args.blocks", "[1,1]", "--trainer.max_epochs", "1"]
WORDS += ["--teacher", "null", "--quantize", "null", "--prune.ignore", "[stem]"]
WORDS += [
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--data.init_args.batch_size",
    "128",
]
RATIOS = ["--ratios", "0.25", "0.5"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose network was measured in one go."""
    path = tmp_path_factory.mktemp("sensitivity") / "run"
    assert compress.cli.main(["sensitivity", "digits", *WORDS, *RATIOS, "--run_dir", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "run" in request.fixturenames:  # drawn once, for `measured`, and tested by themselves
        monkeypatch.setattr(step, "save_sensitivity", lambda *_: [])


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "run"))


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "sensitivity.json").read_text())


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = compress.cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), " ".join(captured.err.split())


class Judge:
    """Counts what is judged, and is interrupted after some points."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: float = float("inf")) -> None:
        self.count, self.stop, self.judge = 0, stop, step.judge
        monkeypatch.setattr(step, "judge", self)

    def __call__(self, *arguments: Any) -> Any:
        if self.count == self.stop:
            raise KeyboardInterrupt
        self.count += 1
        return self.judge(*arguments)


def test_curves_and_pictures_are_there(measured: Path) -> None:
    saved = read(measured)
    assert (saved["stage"], saved["criterion"], saved["metric"]) == ("baseline", "l2", "accuracy")
    assert set(saved["curves"]) == set(saved["widths"]) == {"stages.0.0.conv1", "stages.1.0.conv1", "stages.1.0.conv2"}
    for points in saved["curves"].values():
        assert [ratio for ratio, _ in points] == [0.0, 0.25, 0.5]
        assert points[0] == saved["curves"]["stages.0.0.conv1"][0]
    assert {"sensitivity.png", "sensitivity.svg"} < {path.name for path in measured.iterdir()}
    assert not list(measured.rglob("*.tmp"))


def test_the_point_at_zero_is_the_loss_that_training_saw(measured: Path) -> None:
    logged = json.loads((measured / "logs" / "baseline.json").read_text())
    whole = read(measured)["curves"]["stages.0.0.conv1"][0][1]
    for name in ("loss", "accuracy"):
        assert whole[name] == pytest.approx(logged[f"val/{name}"][-1][1], rel=1e-4)


@pytest.mark.parametrize("stop", [0, 4])
def test_a_stopped_measurement_goes_on_and_ends_the_same(
    measured: Path, run: Path, stop: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "sensitivity.json").unlink()
    with monkeypatch.context() as patch:
        Judge(patch, stop)
        code, out, err = call(capsys, "sensitivity", run, *RATIOS, "--data.init_args.batch_size", "128")
    assert code == 130
    assert f"{stop} of 7 points are kept in {run}/sensitivity.json" in out
    words = f"compress sensitivity {run} --data.init_args.batch_size 128 --ratios 0.25 0.5"
    assert f"Go on with: {words}" in err
    judge = Judge(monkeypatch)
    assert call(capsys, *words.split()[1:])[0] == 0
    assert judge.count == 7 - stop
    assert (run / "sensitivity.json").read_bytes() == (measured / "sensitivity.json").read_bytes()


def test_a_finished_measurement_does_nothing_again_and_more_ratios_add_points(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = Judge(monkeypatch)
    before = read(run)
    assert call(capsys, "sensitivity", run, *RATIOS)[0] == 0
    assert judge.count == 0
    assert read(run) == before
    assert call(capsys, "sensitivity", run, "--ratios", "0.3", "0.75")[0] == 0
    after = read(run)
    assert (judge.count, after["num_points"]) == (3, 10)  # 0.3 of 4 and of 8 units is a quarter of them
    assert [ratio for ratio, _ in after["curves"]["stages.0.0.conv1"]] == [0.0, 0.25, 0.5, 0.75]
    assert [ratio for ratio, _ in after["curves"]["stages.1.0.conv1"]] == [0.0, 0.25, 0.5, 0.75]


def _other_weights(run: Path) -> list[str]:
    path = run / "checkpoints" / "baseline.pt"
    saved = torch.load(path, weights_only=True)
    next(iter(saved["state_dict"].values())).add_(1e-3)
    torch.save(saved, path)
    return []


def _other_data(run: Path) -> list[str]:
    return ["--data.init_args.num_val", "150"]


def _other_layers(run: Path) -> list[str]:
    return ["--prune.ignore", "[stem,stages.0]"]


@pytest.mark.parametrize(
    ("change", "words"), [(_other_weights, "weights"), (_other_data, "data"), (_other_layers, "layers")]
)
def test_a_stale_measurement_begins_anew(
    run: Path, change: Any, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = Judge(monkeypatch)
    code, out, _ = call(capsys, "sensitivity", run, *RATIOS, *change(run))
    assert code == 0
    assert f"expected a measurement with the same {words}, got one with others. It is measured anew." in out
    assert judge.count == read(run)["num_points"]


@pytest.mark.parametrize("text", ["", "[]", '{"curves": 3}'])
def test_another_file_is_named(run: Path, text: str) -> None:
    (run / "sensitivity.json").write_text(text)
    opened = RunDirectory(run, None, Console(quiet=True))  # type: ignore[arg-type]
    with pytest.raises(RunError, match="expected a measurement of this version"):
        read_sensitivity(opened)


def test_another_file_does_not_stop_a_measurement(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "sensitivity.json").write_text("another")
    code, out, _ = call(capsys, "sensitivity", run, "--ratios", "0.5")
    assert code == 0
    assert "got another file. It is measured anew." in out


@pytest.mark.parametrize("criterion", ["taylor", "apoz"])
def test_criteria_that_need_data_get_it(run: Path, criterion: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ratios", "0.5", "--prune.criterion", criterion]
    code, out, _ = call(capsys, "sensitivity", run, *words)
    assert code == 0
    assert "the same criterion, got one with others" in out
    assert read(run)["criterion"] == criterion


def test_the_distilled_network_goes_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run / "checkpoints" / "baseline.pt", run / "checkpoints" / "distilled.pt")
    code, out, _ = call(capsys, "sensitivity", run, *RATIOS)
    assert code == 0
    assert "sensitivity of the network of stage 'distilled'" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digts"], "recipe: expected a file or one of"),
        (["RUN", "--ratios", "50"], "ratios: expected fractions between 0 and 1, got 50. Use 0.5"),
        (["RUN", "--run_dir", "x"], "--run_dir: expected none beside a run's directory"),
        (["."], "expected a run directory with a recipe.yaml"),
        (["RUN", "--prune.ignore", "[stem,stages]"], "sensitivity: expected layers that can be pruned, got none"),
    ],
)
def test_mistakes_are_named(
    run: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    code, _, err = call(capsys, "sensitivity", *[word.replace("RUN", str(run)) for word in words])
    assert code == 2
    assert message in err


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compress.cli.main(["sensitivity", "--help"])
    assert "the same command goes on" in " ".join(capsys.readouterr().out.split())


def test_fewer_validation_batches_are_taken_as_the_trainer_takes_them(run: Path) -> None:
    for limit, num in [("0.5", 1), ("99", 2), ("null", 2)]:
        opened = open_run(run, overrides=["--trainer.limit_val_batches", limit], console=Console(quiet=True))
        assert step.validation(opened)[1] == num


def test_the_report_has_the_curves(run: Path) -> None:
    shutil.copy(run / "checkpoints" / "baseline.pt", run / "checkpoints" / "final.pt")
    costs = {"num_params": 1, "macs": 1, "bytes": 1, "peak_memory": 1, "latency": []}
    metrics = {"accuracy": 0.5}
    opened = open_run(run, console=Console(quiet=True))
    opened.write_json("test", {"baseline": metrics, "final": metrics})
    opened.write_json("bench", {"baseline": costs, "final": costs, "artifact": {**costs, "metrics": metrics}})
    report(opened)
    assert json.loads((run / "report.json").read_text())["sensitivity"]["curves"] == read(run)["curves"]
    page = (run / "report.html").read_text()
    assert "Sensitivity of the layers" in page
    assert "stages.1.0.conv2" in page[page.index("Sensitivity of the layers") :]


def test_the_last_target_is_reported() -> None:
    figures = {"metric": "macs", "original": 4.0, "goal": 1.6, "engine": None}
    edits = [
        Edit("prune", {"target": {**figures, "wanted": wanted, "reached": reached}})
        for wanted, reached in [(3.1, 3.0), (1.7, 1.5)]
    ]
    target = _target(History([*edits, Edit("prune", {"widths": {}})]))
    assert target is not None
    # The second edit, on the way, has met the goal.
    assert (target.metric, target.original, target.wanted, target.reached) == ("macs", 4.0, 1.6, 1.5)
    assert _target(History()) is None
