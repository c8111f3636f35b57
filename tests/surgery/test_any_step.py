"""A fit that prunes somebody else's module goes on bit for bit from a checkpoint taken at any step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from compress.surgery import RandomStates, history_of
from tests.networks import trainer
from tests.surgery.modules import Foreign, Moved, SaveAfter, pruning, resumable
from tests.surgery.test_optimizers import split_by_decay

STEPS = 16  # four an epoch
CHOSEN = sorted(random.Random(6).sample(range(1, STEPS), 5))


def fit(folder: Path, *, resume: int | None = None) -> tuple[Foreign, list[int]]:
    pl.seed_everything(0 if resume is None else 99, verbose=False)
    module, moved = Foreign(make=split_by_decay), Moved()
    callbacks = [pruning(), RandomStates(), moved, *([SaveAfter(folder, CHOSEN)] if resume is None else [])]
    run = trainer(max_epochs=4, callbacks=callbacks)
    path = None if resume is None else folder / f"step_{resume}.ckpt"
    run.fit(module, resumable(), ckpt_path=path, weights_only=resume is not None)
    return module, moved.widths


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Foreign, list[int]]:
    folder = tmp_path_factory.mktemp("fit")
    return folder, *fit(folder)


def test_steps_are_before_between_and_after_edits(whole: tuple[Path, Foreign, list[int]]) -> None:
    _, _, widths = whole
    assert list(dict.fromkeys(widths)) == [16, 14, 10, 8]
    assert len({widths[step - 1] for step in CHOSEN}) >= 3
    assert any(step % 4 for step in CHOSEN)


@pytest.mark.parametrize("step", CHOSEN)
def test_resumed_equals_uninterrupted(whole: tuple[Path, Foreign, list[int]], step: int) -> None:
    folder, module, widths = whole
    resumed, rest = fit(folder, resume=step)
    assert rest == widths[step:]
    assert history_of(resumed) == history_of(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
