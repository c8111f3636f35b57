"""The command line survives what ends it: Ctrl-C in mid-epoch, SIGKILL in pruning, SIGKILL in quantization."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import compress.cli

FIT = ["fit", "digits", "--baseline", "false", "--teacher.max_epochs", "1", "--trainer.max_epochs", "6"]
FIT += ["--data.init_args.batch_size", "32", "--trainer.enable_progress_bar", "false"]
for network in ("teacher.model", "student"):
    FIT += [f"--{network}.init_args.width", "8", f"--{network}.init_args.blocks", "[1]"]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "COMPRESS_CACHE": str(folder / "cache")}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums in the order of those in this process
    return subprocess.Popen(
        [sys.executable, "-m", "compress.cli", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def here(folder: Path, *words: str) -> int:
    """Run a command in this process, where everything is imported already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COMPRESS_CACHE", str(folder / "cache"))
        return compress.cli.main(list(words))


def stop_when(process: subprocess.Popen[str], run: Path, due: Callable[[list[str]], bool], how: signal.Signals) -> str:
    """Send a signal once the edits in the resume point are as wanted."""
    path = run / "checkpoints" / "student.last.ckpt"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists():
            kinds = [edit["kind"] for edit in torch.load(path, weights_only=True)["compress_history"]]
            if due(kinds):
                process.send_signal(how)
                break
        time.sleep(0.02)
    out, _ = process.communicate(timeout=200)
    return out


def final(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "checkpoints" / "final.pt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    assert here(folder, *FIT, "--run_dir", "whole") == 0
    return folder


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """A run that Ctrl-C ended in mid-epoch, while it pruned."""
    run = folder / "stopped"
    process = start(folder, *FIT, "--run_dir", run.name)
    out = stop_when(process, run, lambda kinds: "prune" in kinds, signal.SIGINT)
    assert process.returncode == 130, out
    assert "compress run --resume" in " ".join(out.split())
    state = torch.load(run / "checkpoints" / "student.last.ckpt", weights_only=True)
    assert state["global_step"] > 0
    return run


def test_a_checkpoint_of_another_recipe_is_refused(
    folder: Path, stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert here(folder, "fit", "--resume", stopped.name, "--student.init_args.width", "16") == 2
    out = "".join(capfd.readouterr())
    assert "Traceback" not in out
    assert "expected" in out


def test_sigkill_in_pruning_and_again_in_quantization(
    folder: Path, stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(stopped / "checkpoints" / "student.last.ckpt", weights_only=True)
    num = len(state["compress_history"])
    for due in (lambda kinds: len(kinds) > num, lambda kinds: "quantize" in kinds):
        process = start(folder, "fit", "--resume", stopped.name)
        stop_when(process, stopped, due, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (stopped / "checkpoints" / "final.pt").exists()
    capfd.readouterr()
    assert here(folder, "fit", "--resume", stopped.name) == 0
    assert "going on from" in capfd.readouterr().out
    expected, got = final(folder / "whole"), final(stopped)
    assert list(expected) == list(got)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
