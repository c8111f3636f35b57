"""Teachers of whole runs: cached, through assistants, from files, made in the fit; on the embedded digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import compress.cli
from compress.data import Digits
from compress.distill import Classification, OnnxTeacher, SoftTarget
from compress.distill.cache import CacheWriter
from compress.errors import CompressError, DataError
from compress.models import ResNet
from compress.pipeline import cache_teacher, create_run, fit, open_run
from compress.pipeline import test as judge
from compress.pipeline.bench import _cost
from compress.pipeline.rundir import RunDirectory
from compress.recipe import Distill, Recipe, Teacher

SMALL = ["--student.init_args.width", "4", "--teacher.model.init_args.width", "8", "--trainer.max_epochs", "2"]
SMALL += ["--teacher.max_epochs", "1", "--baseline", "false", "--prune", "null", "--quantize", "null"]
SMALL += [
    "--trainer.enable_progress_bar",
    "false",
    "--data.init_args.batch_size",
    "256",
    "--trainer.accelerator",
    "cpu",
]
CACHED = ["--teacher.cache", "true", "--teacher.cache_views", "2", "--teacher.cache_dtype", "float32"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "shared-cache"))


def start(path: Path, *words: str) -> RunDirectory:
    return create_run("recipes/digits.yaml", overrides=[*SMALL, *words], path=path, console=Console(quiet=True))


def final(run: RunDirectory) -> dict[str, Tensor]:
    return torch.load(run.snapshot("final"), weights_only=True)["state_dict"]


def stored(folder: Path) -> list[Path]:
    return sorted((folder / "outputs").glob("*/records.bin"))


def test_a_student_learns_from_stored_outputs_what_it_learns_from_the_teacher(tmp_path: Path) -> None:
    live = start(tmp_path / "live")
    fit(live)
    cached = start(tmp_path / "cached", *CACHED)
    cache_teacher(cached)
    assert not cached.snapshot("final").exists()
    fit(cached)
    ours, theirs = final(cached), final(live)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # Not bit for bit: the teacher has seen other batches, and sums of floats depend on that.
        assert torch.allclose(tensor.float(), theirs[name].float(), atol=5e-3), name


def test_the_command_line_stores_outputs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run_dir", str(tmp_path / "run"), *SMALL]
    assert compress.cli.main(["cache-teacher", "digits", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "teacher: outputs taken from" in out
    assert f"Go on with: compress run --resume {tmp_path / 'run'}" in out
    assert compress.cli.main(["fit", "--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/checkpoints/final.pt").exists()
    assert compress.cli.main(["cache-teacher", "digits", "--run_dir", str(tmp_path / "no"), "--teacher", "null"]) == 2


def test_an_interrupted_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*CACHED, "--teacher.cache_dir"]
    whole = start(tmp_path / "whole", *words, str(tmp_path / "a"))
    cache_teacher(whole)
    original = CacheWriter.write
    calls: list[Any] = []

    def die(self: CacheWriter, *arguments: Any) -> None:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments[:2])
        original(self, *arguments)

    monkeypatch.setattr(CacheWriter, "write", die)
    part = start(tmp_path / "part", *words, str(tmp_path / "b"))
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(part)
    written = (tmp_path / "b/journal.jsonl").read_text().splitlines()
    assert len(written) == 2  # the header and one chunk
    monkeypatch.setattr(CacheWriter, "write", original)
    cache_teacher(open_run(tmp_path / "part", console=Console(quiet=True)))
    assert (tmp_path / "b/records.bin").read_bytes() == (tmp_path / "a/records.bin").read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--teacher.model.init_args.width", "12"], "teacher: expected"),
        (["--data.init_args.shift", "0"], "augmentation: expected"),
        (["--data.init_args.num_val", "201"], "data: expected"),
        (["--teacher.cache_top_k", "3"], "stored: expected"),
        (["--teacher.cache_views", "3"], "augmentation: expected"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_stale_cache_is_refused_with_its_reason(
    change: list[str], reason: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "stale"
    words = [*CACHED, "--teacher.cache_dir", str(folder)]
    if not folder.exists():
        cache_teacher(start(tmp_path / "first", *words))
    cache_teacher(start(tmp_path / "again", *words))
    with pytest.raises(
        DataError, match=f"{folder}: expected outputs of this teacher on these data, got others.*{reason}"
    ):
        cache_teacher(start(tmp_path / "other", *words, *change))


def test_stored_features_and_the_largest_probabilities(tmp_path: Path) -> None:
    losses = [
        {"class_path": "compress.distill.SoftTarget"},
        {"class_path": "compress.distill.AttentionTransfer", "init_args": {"layers": {"stages.*": "stages.*"}}},
    ]
    # The recipe's teacher has a stage more than its student.
    words = ["--teacher.model.init_args.blocks", "[1, 1, 1]", "--teacher.cache_top_k", "4"]
    run = start(tmp_path / "run", *CACHED, *words, "--distill.losses", json.dumps(losses))
    fit(run)
    curves = json.loads((run.path / "logs/student.json").read_text())
    assert curves["train/attention_transfer_loss"][-1][1] > 0
    unknown = json.loads(json.dumps(losses).replace("stages.*", "stages.7"))
    with pytest.raises(
        CompressError, match=r"layers \(student\): expected a layer of ResNet, got 'stages\.7'.*Near names"
    ):
        start(tmp_path / "unknown", "--distill.losses", json.dumps(unknown))


def test_a_chain_of_assistants(tmp_path: Path) -> None:
    assistant = {"class_path": "compress.models.ResNet", "init_args": {"in_channels": 1, "width": 6, "blocks": [1, 1]}}
    run = start(tmp_path / "run", "--teacher.assistants", json.dumps([assistant]))
    fit(run)
    judge(run)
    metrics = json.loads((run.path / "test.json").read_text())
    assert list(metrics) == ["teacher", "assistant0", "final"]
    curves = json.loads((run.path / "logs/assistant0.json").read_text())
    assert "train/soft_target_loss" in curves
    assert sum(p.numel() for p in run.network("assistant0")[0].parameters()) < sum(
        p.numel() for p in run.network("teacher")[0].parameters()
    )


def test_teachers_made_in_the_fit(tmp_path: Path) -> None:
    average = {"class_path": "compress.distill.MovingAverage", "init_args": {"decay": 0.9}}
    words = ["--teacher.model", json.dumps(average)]
    keys = [i for i, word in enumerate(SMALL) if word.startswith("--teacher.model")]
    small = [word for i, word in enumerate(SMALL) if i not in keys and i - 1 not in keys]
    run = create_run(
        "recipes/digits.yaml", overrides=[*small, *words], path=tmp_path / "run", console=Console(quiet=True)
    )
    fit(run)
    assert "train/soft_target_loss" in json.loads((run.path / "logs/student.json").read_text())
    assert run.stages() == ["final"]
    with pytest.raises(CompressError, match=r"teacher\.cache: expected a network with fixed weights"):
        create_run(
            "recipes/digits.yaml", overrides=[*small, *words, "--teacher.cache", "true"], console=Console(quiet=True)
        )


def test_classes_that_differ_are_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"teacher\.model: expected a network that .* fits the task, got"):
        start(tmp_path / "teacher", "--teacher.model.init_args.num_classes", "7")
    wider = ["--teacher.model.init_args.num_classes", "12"]
    with pytest.raises(CompressError, match=r"got \(2, 10\) and \(2, 12\).*the same classes|teacher\.model"):
        start(tmp_path / "wider", *wider)
    assert not list(tmp_path.iterdir())


class Unseeded(Dataset):
    """Augments with a generator of its own, which no key can seed."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(1, 8, 8, generator=self.generator), index % 10


class UnseededData(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Unseeded(), batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Unseeded(), batch_size=16)


def recipe(teacher: Teacher, data: LightningDataModule, *, epochs: int = 1) -> Recipe:
    trainer = {"max_epochs": epochs, "accelerator": "cpu", "enable_progress_bar": False}
    return Recipe(
        student=ResNet(in_channels=1, width=4, blocks=(1,)),
        data=data,
        task=Classification(10),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        teacher=teacher,
        distill=Distill(losses=[SoftTarget(weight=0.5)]),
        trainer=trainer,
        baseline=False,
    )


def test_augmentation_that_no_key_decides_is_refused(tmp_path: Path) -> None:
    teacher = Teacher(ResNet(in_channels=1, width=4, blocks=(1,)), max_epochs=0, cache=True)
    run = create_run(recipe(teacher, UnseededData()), path=tmp_path / "run", console=Console(quiet=True))
    with pytest.raises(DataError, match="expected the same inputs when a sample is asked for again, got others"):
        fit(run)


def test_a_teacher_from_a_file_is_tested_and_measured_as_what_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ResNet(in_channels=1, width=4, blocks=(1,)).eval()
    program = torch.onnx.export(
        network,
        (torch.randn(2, 1, 8, 8),),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
    )
    assert program is not None
    program.save(str(tmp_path / "teacher.onnx"))
    teacher = Teacher(OnnxTeacher(str(tmp_path / "teacher.onnx")), max_epochs=0, cache=True)
    run = create_run(recipe(teacher, Digits()), path=tmp_path / "run", console=Console(quiet=True))
    fit(run)
    judge(run)
    metrics = json.loads((run.path / "test.json").read_text())
    assert list(metrics) == ["teacher", "final"]
    cost = _cost(run.network("teacher")[0], run.held_out[:1])
    assert cost == {"num_params": None, "macs": None, "bytes": (tmp_path / "teacher.onnx").stat().st_size}
