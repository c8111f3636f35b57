"""Two gloo processes: they stay equal through every edit, in integers and after training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.quantize import prepare
from compress.quantize.ranks import follow_first_rank
from tests.quantize.ranks import fit

Ends = dict[str, tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return fit(tmp_path_factory.mktemp("ranks"), "edits", "learn_steps", "fallback", "after")


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


SPOILT = [(0, 0), (1, 2)]  # which rank has a batch of NaN, and when


def see(rank: int, folder: Path) -> None:
    """One of two processes: see batches, of which a rank has one of NaN, and write what became of the ranges."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for case, (spoilt, at) in enumerate(SPOILT):
        torch.save(seen(rank, spoilt, at), folder / f"case{case}_rank{rank}.pt")
    torch.distributed.destroy_process_group()


def seen(rank: int, spoilt: int, at: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = prepare(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), [torch.randn(2, 8)], "int8").train()
    torch.manual_seed(rank)
    for number in range(4):
        x = torch.randn(12, 8)
        if (rank, number) == (spoilt, at):
            x[3, 3] = math.nan
        network(x)
        follow_first_rank(network)
    return network.state_dict()


def test_a_batch_of_nan_on_one_rank_spoils_the_ranges_of_none(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(see, (tmp_path,), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    for case in range(len(SPOILT)):
        first, second = (torch.load(tmp_path / f"case{case}_rank{rank}.pt", weights_only=True) for rank in (0, 1))
        assert len(first) > 20
        for name, tensor in first.items():
            assert bool(tensor.isfinite().all()), name
            assert torch.equal(tensor, second[name]), name
