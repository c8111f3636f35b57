"""Two gloo processes: the ranks stay equal through every edit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent


def test_ranks_stay_equal_through_pruning_and_quantization(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.fit_ddp", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert sorted(set(first["edits"])) == [0, 1, 2, 3, 4]  # each edit with steps of its own
    assert [edit["kind"] for edit in first["history"]] == ["prune"] * 3 + ["quantize"]
    assert first["history"] == second["history"]
    assert max(first["apart"]) == 0.0
    assert first["moments"] == len(first["state"])
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
        assert torch.equal(tensor, first["average"][name]), name  # in the end, the average is what was trained
        assert torch.equal(tensor, second["average"][name]), name
    assert first["state"]["conv1.weight"].shape == (16, 8, 3, 3)
