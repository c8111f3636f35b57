from __future__ import annotations

import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from compress.data.loader import ResumableLoader, Tensors


def loader(epoch: int) -> ResumableLoader:
    sampler: DistributedSampler = DistributedSampler(range(22), 1, 0, shuffle=True, seed=3)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return ResumableLoader(Tensors(torch.arange(22)), batch_size=4, sampler=sampler)


def rows(batches: ResumableLoader) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


@pytest.mark.parametrize("taken", range(6))
def test_goes_on_where_another_one_stopped(taken: int) -> None:
    whole, stopped = rows(loader(2)), loader(2)
    batches = iter(stopped)
    for _ in range(taken):
        next(batches)
    resumed = loader(2)
    resumed.load_state_dict(stopped.state_dict())
    assert rows(resumed) == whole[taken:]
    assert rows(resumed) == whole  # the epoch after begins at its beginning


def test_a_finished_epoch_leaves_no_position() -> None:
    made = loader(0)
    assert len(rows(made)) == len(made) == 6
    assert made.state_dict() == {"position": 0}
