"""Two gloo processes: they stay equal through every edit, in integers and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quantize.ranks import SPOILT, fit

Ends = dict[str, tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ends(folder: Path) -> Ends:
    return fit(folder, "edits", "learn_steps", "fallback", "after")


def test_ranks_stay_equal_through_pruning_and_quantization(ends: Ends) -> None:
    first, second = ends["edits"]
    assert sorted(set(first["edits"])) == [0, 1, 2, 3, 4]  # each edit with steps of its own
    assert [edit["kind"] for edit in first["history"]] == ["prune"] * 3 + ["quantize"]
    assert len(first["statistics"]) >= 4
    assert max(first["statistics"]) == 0  # after each batch, those between which gradients accumulate included
    assert first["moments"] == len(first["state"])
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, first["average"][name]), name  # in the end, the average is what was trained
        assert torch.equal(tensor, second["average"][name]), name
    assert first["state"]["conv1.weight"].shape == (16, 8, 3, 3)


def test_learned_steps_are_equal_on_all_ranks(ends: Ends) -> None:
    first, _ = ends["learn_steps"]
    steps = {name: tensor for name, tensor in first["state"].items() if name.endswith("log_scale")}
    assert len(steps) == 9
    assert all(bool(tensor.any()) for tensor in steps.values())
    assert len(first["statistics"]) >= 4
    assert max(first["statistics"]) == 0
    assert first["moments"] == len(first["state"])


def test_ranks_stay_equal_where_layers_are_rounded_one_by_one(ends: Ends) -> None:
    first, second = ends["fallback"]
    assert [edit["kind"] for edit in first["history"]] == ["prune"] * 3 + ["quantize"]
    assert first["history"][-1]["data"]["fallback"] == "parametrize"
    assert len(first["statistics"]) >= 4
    assert max(first["statistics"]) == 0
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["average"][name]), name


def test_what_is_quantised_after_training_is_that_of_the_first_rank(ends: Ends) -> None:
    first, second = ends["after"]
    assert [edit["kind"] for edit in first["history"]] == ["quantize"]
    ranges = {name: tensor for name, tensor in first["buffers"].items() if "activation_post_process" in name}
    assert len(ranges) >= 8
    for name, tensor in ranges.items():
        assert bool(tensor.isfinite().all()), name
        assert torch.equal(tensor, second["buffers"][name]), name


def test_a_batch_of_nan_on_one_rank_spoils_the_ranges_of_none(ends: Ends, folder: Path) -> None:
    for case in range(len(SPOILT)):
        first, second = (torch.load(folder / f"spoilt{case}_rank{rank}.pt", weights_only=True) for rank in (0, 1))
        assert len(first) > 20
        for name, tensor in first.items():
            assert bool(tensor.isfinite().all()), name
            assert torch.equal(tensor, second[name]), name
