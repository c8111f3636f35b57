"""A student that starts from weights in a file, on the embedded digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from compress.errors import RecipeError
from compress.pipeline import create_run, fit, open_run
from compress.pipeline.rundir import RunDirectory

WORDS = ["--teacher", "null", "--distill.losses", "[]", "--prune", "null", "--quantize", "null"]
WORDS += ["--student.init_args.width", "4", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
WORDS += ["--data.init_args.batch_size", "256", "--trainer.accelerator", "cpu"]
STILL = ["--optimizer.init_args.lr", "0", "--optimizer.init_args.weight_decay", "0"]  # what a fit begins with, it keeps


def finished(path: Path, *words: str) -> RunDirectory:
    run = create_run("recipes/digits.yaml", overrides=[*WORDS, *words], path=path, console=Console(quiet=True))
    fit(run)
    return run


def weights(run: RunDirectory, stage: str = "final") -> dict[str, Tensor]:
    state = torch.load(run.snapshot(stage), weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if "running" not in name and "num_batches" not in name}


def test_student_and_baseline_start_from_the_weights_of_another_run(tmp_path: Path) -> None:
    first = finished(tmp_path / "first", "--baseline", "false")
    words = ["--seed", "1", *STILL, "--student_checkpoint", str(first.snapshot("final"))]
    second = finished(tmp_path / "second", *words)
    wanted = weights(first)
    for stage in ("final", "baseline"):
        found = weights(second, stage)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = finished(tmp_path / "other", "--seed", "1", *STILL, "--baseline", "false")
    assert not torch.equal(weights(other)["fc.weight"], wanted["fc.weight"])
    assert open_run(second.path, console=Console(quiet=True)).recipe.student_checkpoint == words[-1]


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    for name, reason in (("other.pt", "RuntimeError"), ("absent.pt", "FileNotFoundError")):
        words = ["--student_checkpoint", str(tmp_path / name)]
        with pytest.raises(RecipeError, match=rf"student_checkpoint: expected weights of ResNet in .*{name}.*{reason}"):
            finished(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
