"""The command line: what it prints, what it refuses, and that it leaves nothing behind when it does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compress.cli
import compress.runtime
from compress.models import ResNet

DIGITS = ["--trainer.max_epochs", "1", "--teacher.max_epochs", "1"]


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = compress.cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


FIXED_BATCH = """
from torch import nn
class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
    def forward(self, x):
        if x.sum() > 1e9:
            return self.fc(-x.flatten(1))
        return self.fc(x.flatten(1))
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prune.rato", "0.3"], "rato"),
        (["--seed", "soon"], "seed"),
        (["--prune.ratio", "1.5"], "prune.ratio: expected a value in [0, 1), got 1.5. Use 0.5"),
        (["--quantize.start", "0.5"], "quantize.start: expected a value after prune.end"),
        (["--student.class_path", "nowhere.Net"], "nowhere"),
        (["--prune.ignore", "[layer9]"], "prune.ignore: expected names of layers, got 'layer9'"),
        (["--teacher.checkpoint", "none.pt"], "teacher.checkpoint: expected weights of ResNet in none.pt"),
        (["--teacher.checkpoint", "other.pt"], "teacher.checkpoint: expected weights of ResNet in other.pt"),
        (
            ["--student.init_args.in_channels", "3"],
            "student: expected a network that takes inputs of shape (N, 1, 8, 8)",
        ),
        (
            ["--task.init_args.num_classes", "7"],
            "expected a network that takes inputs of shape (N, 1, 8, 8) and fits the task",
        ),
        (["--data", "compress.data.FashionMNIST", "--data.init_args.root", "nowhere"], "nowhere"),
        (
            ["--student", "fixed.FixedBatch", "--prune", "null"],
            "capture: expected a network that torch.export can capture",
        ),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(ResNet(in_channels=1, width=8, blocks=(1,)).state_dict(), "other.pt")
    Path("fixed.py").write_text(FIXED_BATCH)
    before = {path.name for path in tmp_path.iterdir()}
    code, out, err = call(capsys, "run", "digits", *words, "--run_dir", tmp_path / "run")
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == before


def test_an_existing_run_directory_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    code, _, err = call(capsys, "run", "digits", "--run_dir", tmp_path / "run")
    assert code == 2
    assert "expected a new or empty run directory, got one that exists" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "digts"], "recipe: expected a file or one of"),
        (["run"], "recipe: expected a YAML file or the name of a shipped recipe, got none"),
        (["run", "--resume", "nowhere"], "nowhere: expected a run directory with a recipe.yaml"),
        (["run", "digits", "--resume", "nowhere"], "--resume: expected no recipe beside it"),
        (["report", "[bold]nowhere[/]"], "[bold]nowhere[/]: expected a run directory"),
        (
            ["bench", "nowhere"],
            "nowhere: expected a run directory with a recipe.yaml or an artefact with a manifest.json",
        ),
        (["predict", "nowhere", "x.npy"], "nowhere: expected an artefact with a manifest.json"),
        (["convert", "nowhere", "--target", "onnxruntime"], "nowhere: expected an artefact with a manifest.json"),
        (["convert", "nowhere", "--target", "onnxruntime", "more"], "convert: expected no more words, got more"),
    ],
)
def test_wrong_paths_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *words)
    assert code == 2
    assert message in err


def test_broken_yaml_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.yaml").write_text("student: {class_path: [")
    code, _, err = call(capsys, "run", "broken.yaml")
    assert code == 2
    assert "broken.yaml" in err


def test_print_config_is_a_complete_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "run", "digits", "--prune.ratio", "0.3", "--print_config")
    assert code == 0
    Path("printed.yaml").write_text(out)
    again = call(capsys, "run", "printed.yaml", "--print_config")
    assert again[:2] == (0, out)
    assert "ratio: 0.3" in out
    code, shorter, _ = call(capsys, "run", "digits", "--print_config=skip_default")
    assert (code, "width: 24" in shorter, "min_width" in out, "min_width" in shorter) == (0, True, True, False)
    code, _, err = call(capsys, "run", "digits", "--print_config=comments")
    assert (code, "--print_config: expected nothing more or =skip_default, got =comments" in err) == (2, True)


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        compress.cli.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for command in ("run", "fit", "test", "export", "bench", "report", "sensitivity", "convert", "predict", "recipes"):
        assert f"  {command} " in text
    for words, said in [
        (["--version"], f"compress {compress.__version__}"),
        (["cache-teacher", "--help"], "'--print_config'"),
    ]:
        with pytest.raises(SystemExit):
            compress.cli.main(words)
        assert said in capsys.readouterr().out
    code, out, _ = call(capsys, "run", "--keys")
    assert code == 0
    keys = (
        "trainer.max_epochs",
        "teacher.cache",
        "prune.ratio",
        "sparsify.pattern",
        "quantize.scheme",
        "export.targets",
    )
    for key in (*keys, "distill.task_weight"):
        assert f"  --{key} " in out
    assert "torch.nn." not in out  # no list of all networks that there are
    assert "--config" not in out


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    assert "digits" in out
    assert "fashion_mnist" in out
    assert "pip install -e '.[zoo]'" in out


def test_arrays_of_another_kind_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("objects.npy", np.array([object()]), allow_pickle=True)
    (tmp_path / "x").mkdir()
    code, _, err = call(capsys, "predict", tmp_path / "x", "objects.npy")
    assert code == 2
    assert "expected an artefact" in err


def artifact_of_a_run() -> tuple[torch.nn.Module, torch.Tensor]:
    """Export a network to run/artifact, and return it with its inputs."""
    from compress.export import export_artifact
    from compress.surgery.capture import export_program

    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    x = torch.randn(9, 4)
    export_artifact(
        export_program(network, [x[:2]]), Path("run/artifact"), targets=["eager"], reference=network, held_out=[x]
    )
    return network, x


def test_engines_are_measured_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    artifact_of_a_run()
    before = torch.get_num_threads()
    words = ["bench", "run/artifact", "--batch_sizes", "1", "3", "--threads", "1", "--seconds", "0.01"]
    code, out, _ = call(capsys, *words, "--json", "rows.json", "--plot", "[bold].png")  # no markup of Rich's
    assert code == 0
    assert "plot: [bold].png" in out
    assert Path("[bold].png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads(Path("rows.json").read_text())
    assert [(row["batch"], row["engine"], row["threads"]) for row in found["rows"]] == [
        (1, "eager", 1),
        (3, "eager", 1),
    ]
    assert found["engines_by_batch"] == {"1": "eager"}
    assert torch.get_num_threads() == before
    for more, message in [
        (["--plot", "picture"], "--plot: expected a file ending in .png"),
        (["--json", "nowhere/rows.json"], "--json: expected a file in a folder that can be written"),
        (["--prune.ratio", "0.3"], "bench: expected no more words, got --prune.ratio 0.3"),
        (["--seconds", "0"], "seconds: expected a positive number, got 0.0"),
    ]:
        code, _, err = call(capsys, *words, *more)
        assert (code, message in err) == (2, True), err
    Path("run/recipe.yaml").touch()
    code, _, err = call(capsys, "bench", "run", "--threads", "1")
    assert (code, "expected an artefact beside --threads, got run. Give run/artifact" in err) == (2, True)


def test_what_loading_says_is_printed_and_other_libraries_chatter_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact_of_a_run()
    load = compress.runtime.load

    def warning(*args: Any, **kwargs: Any) -> Any:
        warnings.warn("left out on this machine: one", stacklevel=2)
        warnings.warn("device: the CPU serves", stacklevel=2)
        warnings.warn_explicit("chatter", UserWarning, "/a/library.py", 1)
        return load(*args, **kwargs)

    monkeypatch.setattr(compress.runtime, "load", warning)
    words = ["bench", "run/artifact", "--batch_sizes", "1", "--threads", "1", "--seconds", "0.01"]
    code, out, _ = call(capsys, *words, "--json", "rows.json")
    assert (code, "device: the CPU serves" in out, "chatter" in out) == (0, True, False)
    assert json.loads(Path("rows.json").read_text())["left_out"] == ["left out on this machine: one"]


def test_rows_of_a_table_are_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    network, x = artifact_of_a_run()
    np.savetxt("x.csv", x.numpy(), delimiter=",", header="a,b,c,d", comments="")
    np.save("x.npy", x.numpy())
    with torch.no_grad():
        wanted = network(x).softmax(-1).sort(descending=True)
    assert call(capsys, "predict", "run", "x.csv", "--top-k", "2", "--json", "rows.json")[:2] == (0, "")
    rows = json.loads(Path("rows.json").read_text())
    assert [row["input"] for row in rows] == [str(index) for index in range(9)]
    assert [[int(best["label"]) for best in row["top"]] for row in rows] == wanted.indices[:, :2].tolist()
    assert [row["probability"] for row in rows] == pytest.approx(wanted.values[:, 0].tolist(), abs=1e-5)
    code, out, _ = call(capsys, "predict", "run", "x.npy", "--top_k", "2")
    assert code == 0
    assert all(f"{best['probability']:.3f}" in out for row in rows for best in row["top"])
    for words, message in [
        (["x.csv", "--top_k", "4"], "--top_k: expected 1 to 3, the number of classes, got 4"),
        (["x.csv", "--resize"], "--resize: expected an image or a folder of images, got x.csv"),
        (["none.csv"], "none.csv: expected a file or a folder, got none"),
        (["x.csv", "--json", "run"], "--json: expected a file in a folder that can be written, got run"),
    ]:
        code, _, err = call(capsys, "predict", "run", *words)
        assert (code, message in err) == (2, True), err


def test_a_target_is_added_to_an_artefact(capsys: pytest.CaptureFixture[str]) -> None:
    from compress.runtime import load

    network, x = artifact_of_a_run()
    code, out, _ = call(capsys, "convert", "run", "--target", "onnxruntime")
    assert code == 0
    assert "onnxruntime" in out
    assert "64 inputs, random, seed 0" in out
    assert torch.allclose(load("run/artifact", engine="onnxruntime")(x), network(x), atol=1e-5)
    np.save("x.npy", x.numpy())
    for words, message in [
        (["--target", "onnxruntime"], "Say replace=True (--replace) to build it anew"),
        (["--target", "abacus"], "target: expected names among eager, aoti,"),
        (["--target", "onnxruntime", "--replace", "--inputs", "none.npy"], "none.npy: expected an array"),
        (["--target", "onnxruntime", "--replace", "--inputs", "x.npy", "x.npy"], "inputs: expected 1, got 2"),
    ]:
        code, _, err = call(capsys, "convert", "run/artifact", *words)
        assert (code, message in err) == (2, True), err
    code, out, _ = call(capsys, "convert", "run", "--target", "onnxruntime", "--replace", "--inputs", "x.npy")
    assert code == 0
    assert "9 inputs, given" in out
    with pytest.raises(SystemExit):
        call(capsys, "convert", "--help")
    assert "signed as this machine's afterwards" in " ".join(capsys.readouterr().out.split())
