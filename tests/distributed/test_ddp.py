"""Two gloo processes: the ranks stay equal through every edit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent


def fit(folder: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what each rank ended with; nothing may be apart while weights are trained in integers."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.fit_ddp", str(folder), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert max(first["apart"]) == 0
    assert len(first["statistics"]) >= 4
    assert max(first["statistics"]) == 0  # after each batch, those between which gradients accumulate included
    assert first["history"] == second["history"]
    assert first["moments"] == len(first["state"])
    return first, second


def test_ranks_stay_equal_through_pruning_and_quantization(tmp_path: Path) -> None:
    first, second = fit(tmp_path)
    assert sorted(set(first["edits"])) == [0, 1, 2, 3, 4]  # each edit with steps of its own
    assert [edit["kind"] for edit in first["history"]] == ["prune"] * 3 + ["quantize"]
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
        assert torch.equal(tensor, first["average"][name]), name  # in the end, the average is what was trained
        assert torch.equal(tensor, second["average"][name]), name
    assert first["state"]["conv1.weight"].shape == (16, 8, 3, 3)


def test_learned_steps_are_equal_on_all_ranks(tmp_path: Path) -> None:
    first, second = fit(tmp_path, "learn_steps")
    steps = {name: tensor for name, tensor in first["state"].items() if name.endswith("log_scale")}
    assert len(steps) == 9
    assert all(bool(tensor.any()) for tensor in steps.values())
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())


def test_ranks_stay_equal_where_layers_are_rounded_one_by_one(tmp_path: Path) -> None:
    first, second = fit(tmp_path, "fallback")
    assert [edit["kind"] for edit in first["history"]] == ["prune"] * 3 + ["quantize"]
    assert first["history"][-1]["data"]["fallback"] == "parametrize"
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
        assert torch.equal(tensor, second["average"][name]), name
