"""The whole job on the embedded data: one command, and everything that it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compress
import compress.cli
from compress.data import Digits
from compress.measure.machine import has_vnni
from compress.measure.reporting.report import read_report

ENGINES = {"eager", "onnxruntime"} | ({"aoti"} if has_vnni() else set())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end")
    os.environ["COMPRESS_CACHE"] = str(folder / "cache")
    words = [
        "run",
        "digits",
        "--run_dir",
        str(folder / "run"),
        "--teacher.max_epochs",
        "4",
        "--teacher.model.init_args.width",
        "48",
        "--teacher.model.init_args.blocks",
        "[1, 1, 1]",
        "--trainer.max_epochs",
        "8",
    ]
    words += ["--trainer.enable_progress_bar", "false", "--export.min_top1_agreement", "0.95"]
    words += ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(folder / "tensorboard")]
    assert compress.cli.main(words) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def test_the_run_directory_is_complete(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "checkpoints", "logs", "artifact", "report.json", "report.html"} <= names
    stages = ("teacher", "baseline", "distilled", "pruned", "final")
    histories = {"pruned.history.json", "final.history.json"}  # where something was edited
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"{stage}.pt" for stage in stages} | histories
    assert not list(run.rglob("*.tmp"))


def test_the_report_tells_every_stage(report: dict[str, Any], run: Path) -> None:
    names = [stage["name"] for stage in report["stages"]]
    assert names == ["teacher", "student alone", "distilled", "pruned", "int8 artefact"]
    for stage in report["stages"]:
        assert 0.5 < stage["metrics"]["accuracy"] <= 1
        assert stage["num_params"] > 0
        assert stage["macs"] > 0
        assert stage["bytes"] > 0
        assert stage["peak_memory"] > 0
        assert {row["batch"] for row in stage["latency"]} == {1, 32}
        assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in stage["latency"])
    teacher, artifact = report["stages"][0], report["stages"][-1]
    assert artifact["bytes"] * 4 < teacher["bytes"]
    assert artifact["num_params"] < report["stages"][2]["num_params"] / 2
    assert read_report(run / "report.json").stages[-1].artifact_bytes > artifact["bytes"]  # type: ignore[operator]


def test_the_page_needs_nothing_else(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "int8 artefact" in page
    for reference in ('src="http', 'href="http', "<script src", "@import"):
        assert reference not in page


def test_the_artifact_is_int8_and_agrees(run: Path) -> None:
    manifest = compress.load(run / "artifact").manifest
    assert set(manifest.targets) == ENGINES
    if "aoti" in ENGINES:
        assert manifest.targets["aoti"].census["int8_kernels"] >= 8
        assert manifest.targets["aoti"].census["float_kernels"] == 0
    else:
        assert "VNNI" in manifest.skipped["aoti"]
    assert manifest.targets["onnxruntime"].census["int8_kernels"] > 0
    for target in manifest.targets.values():
        assert target.agreement["top1_agreement"] >= 0.95
    assert manifest.scheme == "int8"
    assert [edit["kind"] for edit in manifest.history].count("quantize") == 1


def test_raw_digits_are_recognised_by_every_engine(run: Path) -> None:
    source = Digits().load().test
    for engine in ENGINES:
        model = compress.load(run / "artifact", engine=engine)
        labels, probabilities = model.predict(source.images)
        assert np.mean([str(label) == str(truth) for label, truth in zip(labels, source.labels)]) > 0.8
        assert np.allclose(probabilities.sum(1), 1)


def test_serving_imports_no_training_library(run: Path) -> None:
    code = f"""
import sys, torch, compress
model = compress.load({str(run / "artifact")!r})
print(model.engine, model(torch.zeros(3, 1, 8, 8)).shape)
assert not {{"pytorch_lightning", "torch_pruning", "torchao", "datasets"}} & set(sys.modules), sys.modules.keys()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch.Size([3, 10])" in out


def test_a_finished_run_does_nothing_again(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}
    assert compress.cli.main(["run", "--resume", str(run)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()} == before


def test_predict_and_bench_on_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "digits.npy", Digits().load().test.images[:5])
    words = ["predict", str(run), str(tmp_path / "digits.npy"), "--json", str(tmp_path / "out.json")]
    assert compress.cli.main(words) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == 5
    assert set(rows[0]) == {"input", "label", "probability"}
    capsys.readouterr()
    words = ["bench", str(run / "artifact"), "--seconds", "0.05", "--threads", "1"]
    assert compress.cli.main([*words, "--plot", str(tmp_path / "bench.png")]) == 0
    out = capsys.readouterr().out
    assert all(engine in out for engine in ENGINES)
    assert "\N{MULTIPLICATION SIGN} float32" in out  # not the program of integers, which is slower in floats


def test_the_table_went_to_tensorboard(run: Path) -> None:
    assert list((run.parent / "tensorboard").rglob("events.out.tfevents.*"))


def test_snapshots_load_without_pickles(run: Path) -> None:
    for path in (run / "checkpoints").glob("*.pt"):
        assert set(torch.load(path, weights_only=True)) == {"history", "state_dict"}
