"""Two gloo processes: what is learned from data in integers, or after training, is the same on both."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed.ranks import fit


def test_learned_steps_are_equal_on_all_ranks(tmp_path: Path) -> None:
    first, _ = fit(tmp_path, "learn_steps")
    steps = {name: tensor for name, tensor in first["state"].items() if name.endswith("log_scale")}
    assert len(steps) == 9
    assert all(bool(tensor.any()) for tensor in steps.values())
    assert len(first["statistics"]) >= 4
    assert max(first["statistics"]) == 0
    assert first["moments"] == len(first["state"])


def test_ranks_stay_equal_where_layers_are_rounded_one_by_one(tmp_path: Path) -> None:
    first, second = fit(tmp_path, "fallback")
    assert [edit["kind"] for edit in first["history"]] == ["prune"] * 3 + ["quantize"]
    assert first["history"][-1]["data"]["fallback"] == "parametrize"
    assert len(first["statistics"]) >= 4
    assert max(first["statistics"]) == 0
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["average"][name]), name


def test_what_is_quantised_after_training_is_that_of_the_first_rank(tmp_path: Path) -> None:
    first, second = fit(tmp_path, "after")
    assert [edit["kind"] for edit in first["history"]] == ["quantize"]
    ranges = {name: tensor for name, tensor in first["buffers"].items() if "activation_post_process" in name}
    assert len(ranges) >= 8
    for name, tensor in ranges.items():
        assert bool(tensor.isfinite().all()), name
        assert torch.equal(tensor, second["buffers"][name]), name
