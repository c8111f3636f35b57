"""Two gloo processes: the ranks stay equal through every edit."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed.ranks import fit


def test_ranks_stay_equal_through_pruning_and_quantization(tmp_path: Path) -> None:
    first, second = fit(tmp_path, "edits")["edits"]
    assert sorted(set(first["edits"])) == [0, 1, 2, 3, 4]  # each edit with steps of its own
    assert [edit["kind"] for edit in first["history"]] == ["prune"] * 3 + ["quantize"]
    assert len(first["statistics"]) >= 4
    assert max(first["statistics"]) == 0  # after each batch, those between which gradients accumulate included
    assert first["moments"] == len(first["state"])
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, first["average"][name]), name  # in the end, the average is what was trained
        assert torch.equal(tensor, second["average"][name]), name
    assert first["state"]["conv1.weight"].shape == (16, 8, 3, 3)
