"""Two gloo processes: feature losses, their projectors and memories stay equal through every edit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    done = subprocess.run(
        [sys.executable, "-m", "tests.distill.fit_ddp", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_ranks_stay_equal_with_all_that_losses_learn(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert [edit["kind"] for edit in first["history"]] == ["prune", "quantize"]
    assert len(first["apart"]) > 10
    assert max(first["apart"]) == 0.0
    assert any("projectors" in name for name in first["parameters"])
    for name, tensor in first["parameters"].items():
        assert torch.equal(tensor, second["parameters"][name]), name


def test_every_ranks_samples_enter_the_memory(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert torch.equal(first["memory"], second["memory"])
    assert bool((first["memory"] != first["memory_before"]).any(dim=1).all())
    assert not set(first["indices"]) & set(second["indices"])
    assert set(first["indices"]) | set(second["indices"]) == set(range(96))


def test_the_teacher_is_in_no_bucket(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["num_reduced"] == len(ranks[0]["parameters"])
