from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from compress.data import ArrayDataModule, ImageSplit, ImageSplits, KeyedDataModule, keyed_loader, keyed_uniform
from compress.data.keyed import KeyedSampler, split_keys
from compress.errors import DataError

NUM = 37


class Noisy(Dataset):
    """A user's data set that augments with every generator there is."""

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = torch.tensor([float(torch.rand(())), float(np.random.rand()), random.random()])
        return torch.cat([torch.tensor([float(index)]), drawn]), index % 3


class Images(ArrayDataModule):
    def load(self) -> ImageSplits:
        images = np.random.default_rng(0).integers(1, 256, (NUM, 6, 6)).astype(np.uint8)
        split = ImageSplit(images, np.arange(NUM) % 2)
        return ImageSplits(split, split.take(np.arange(8)), split.take(np.arange(8)), ["even", "odd"])


def by_key(loader: Any, epoch: int = 0) -> dict[tuple[int, ...], Tensor]:
    loader.sampler.set_epoch(epoch)
    return {tuple(key): x for batch in loader for x, key in zip(batch[0], batch[2].tolist())}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@given(
    seed=st.integers(-(2**40), 2**40), rows=st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 9)), min_size=1)
)
@settings(max_examples=50, deadline=None)
def test_draws_depend_on_the_key_alone(seed: int, rows: list[tuple[int, int]]) -> None:
    index, view = torch.tensor(rows).T
    drawn = keyed_uniform(seed, index, view, 3)
    assert bool(((drawn >= 0) & (drawn < 1)).all())
    turned = keyed_uniform(seed, index.flip(0), view.flip(0), 3).flip(0)
    assert torch.equal(drawn, turned)
    assert torch.equal(keyed_uniform(seed, index[:1], view[:1], 2), drawn[:1, :2])


def test_draws_are_uniform_and_unrelated() -> None:
    index = torch.arange(20000)
    views = [keyed_uniform(0, index, torch.full_like(index, view), 2) for view in range(3)]
    columns = torch.cat([*views, keyed_uniform(1, index, torch.zeros_like(index), 2)], dim=1).T
    assert columns.mean(1).sub(0.5).abs().max() < 0.01
    assert columns.std(1).sub(12**-0.5).abs().max() < 0.01
    assert torch.corrcoef(columns).sub(torch.eye(len(columns))).abs().max() < 0.03
    shifted = torch.stack([columns[0, :-1], columns[0, 1:]])
    assert torch.corrcoef(shifted)[0, 1].abs() < 0.03


@pytest.mark.parametrize("workers", [0, 4])
def test_a_view_is_the_same_in_any_order_and_any_worker(workers: int) -> None:
    reference = by_key(keyed_loader(DataLoader(Noisy(), batch_size=5), seed=3, view=1))
    shuffled = keyed_loader(DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers), seed=3, view=1)
    assert same(by_key(shuffled, epoch=4), reference)
    assert list(by_key(shuffled, epoch=4)) != list(by_key(shuffled, epoch=5))
    other = by_key(keyed_loader(DataLoader(Noisy(), batch_size=5), seed=4, view=1))
    assert not any(torch.equal(other[key][1:], reference[key][1:]) for key in reference)
    assert all(x[0] == index for (index, _), x in reference.items())


@pytest.mark.parametrize("workers", [0, 4])
def test_our_data_modules_likewise(workers: int) -> None:
    def views(workers: int, epoch: int, batch_size: int) -> dict:
        data = Images(batch_size=batch_size, shift=2, flip=True, num_workers=workers)
        return by_key(keyed_loader(data.train_dataloader(), seed=0, num_views=2), epoch)

    first, second = views(0, 0, 5), views(0, 1, 5)
    assert same(views(workers, 2, 8), first)
    assert same(views(workers, 3, 8), second)
    assert sum(not torch.equal(first[index, 0], second[index, 1]) for index in range(NUM)) > NUM / 2


def test_epochs_take_views_in_turn_and_ranks_share_an_epoch() -> None:
    sampler = KeyedSampler(5, shuffle=True, num_views=3)
    seen = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        keys = split_keys(list(sampler), 5)
        assert sorted(keys[:, 0].tolist()) == list(range(5))
        seen.append(set(keys[:, 1].tolist()))
    assert seen == [{0}, {1}, {2}, {0}]
    own = KeyedSampler(5, shuffle=False)
    own.set_epoch(7)
    assert list(own) == [35, 36, 37, 38, 39]


def test_the_global_generators_are_left_alone() -> None:
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    list(keyed_loader(DataLoader(Noisy(), batch_size=5, shuffle=True), seed=0))
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_forms_of_a_batch() -> None:
    x = torch.arange(4.0)
    _, nothing, keys = next(iter(keyed_loader(DataLoader(TensorDataset(x), batch_size=4), seed=0)))
    assert nothing is None
    assert keys.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    rows = [{"x": x[i], "labels": i} for i in range(4)]
    assert set(next(iter(keyed_loader(DataLoader(rows, batch_size=2), seed=0)))) == {"x", "labels", "keys"}  # type: ignore[arg-type]
    assert len(next(iter(keyed_loader(DataLoader(x, batch_size=2), seed=0)))) == 3  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"expected \(inputs, targets\) to add keys to, got 3 parts"):
        next(iter(keyed_loader(DataLoader(TensorDataset(x, x, x), batch_size=2), seed=0)))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(3))


class Own(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "error"),
    [
        (lambda: DataLoader(Stream()), "expected a data set with indices"),
        (lambda: DataLoader(Noisy(), sampler=WeightedRandomSampler([1.0] * NUM, NUM)), "WeightedRandomSampler"),
        (lambda: DataLoader(Noisy(), sampler=RandomSampler(range(NUM), replacement=True)), "RandomSampler"),
        (lambda: DataLoader(Noisy(), batch_sampler=Own(SequentialSampler(range(NUM)), 4, False)), "by Own"),
        (lambda: [1, 2], "expected a DataLoader for a cached teacher, got list"),
    ],
)
def test_what_cannot_have_keys(loader: Any, error: str) -> None:
    with pytest.raises(DataError, match=error):
        keyed_loader(loader(), seed=0)


class Users(LightningDataModule):
    colour = "red"

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Noisy(), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Noisy(), batch_size=8)


class Late(Users):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def test_a_users_data_module_with_keys() -> None:
    data = KeyedDataModule(Users(), seed=0, num_views=2)
    assert data.colour == "red"
    assert len(by_key(data.train_dataloader())) == NUM
    assert len(next(iter(data.val_dataloader()))) == 2
    with pytest.raises(AttributeError):
        _ = data.nothing
    with pytest.raises(DataError, match="expected a module without on_after_batch_transfer, got one in Late"):
        KeyedDataModule(Late(), seed=0, num_views=1)
