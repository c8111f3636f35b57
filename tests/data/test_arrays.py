from __future__ import annotations

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from compress.data import ArrayDataModule, ImageSplit, ImageSplits
from compress.errors import DataError, RecipeError


class Colours(ArrayDataModule):
    """Colour images of which each names its own index in its first pixel."""

    def load(self) -> ImageSplits:
        images = np.random.default_rng(0).integers(1, 256, (64, 4, 6, 3)).astype(np.uint8)
        images[:, 0, 0, 0] = np.arange(64)
        split = ImageSplit(images, np.arange(64) % 2)
        return ImageSplits(
            train=split.take(np.arange(40)),
            val=split.take(np.arange(40, 52)),
            test=split.take(np.arange(52, 64)),
            classes=("even", "odd"),
        )


class Watcher(pl.LightningModule):
    """Keep the batches that a step sees."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(72, 2)
        self.seen: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen["train"].append(batch[0])
        return nn.functional.cross_entropy(self.fc(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen["val"].append(batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen["test"].append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(max_epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def indices(data: Colours, x: Tensor) -> list[int]:
    """Return the indices that images carry in their first pixel."""
    how = data.preprocessing
    return ((x[:, 0, 0, 0] * how["std"][0] + how["mean"][0]) / how["scale"]).round().int().tolist()


def order(seed: int, epoch: int) -> list[int]:
    data = Colours(batch_size=16, seed=seed)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [index for x, *_ in loader for index in indices(data, x)]


def global_states() -> tuple:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_each_epoch_is_a_permutation_that_seed_and_epoch_decide() -> None:
    first = order(0, 0)
    assert sorted(first) == list(range(40))
    torch.manual_seed(99)
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(1, 0) != first


def test_lightning_gives_each_epoch_its_own_order() -> None:
    data, module = Colours(batch_size=40, seed=5), Watcher()
    trainer(max_epochs=3).fit(module, data)
    assert [indices(data, x) for x in module.seen["train"]] == [order(5, epoch) for epoch in range(3)]


def test_iterating_leaves_the_global_generators_alone() -> None:
    data = Colours(batch_size=16)
    data.setup()
    before = global_states()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert len(list(loader)) > 0
    assert global_states() == before


def test_validation_and_test_keep_order_and_miss_none() -> None:
    data = Colours(batch_size=5)
    for loader, expected in ((data.val_dataloader(), range(40, 52)), (data.test_dataloader(), range(52, 64))):
        for _ in range(2):
            assert [index for x, _ in loader for index in indices(data, x)] == list(expected)


def test_batches_are_normalised_channel_by_channel() -> None:
    data = Colours(batch_size=40)
    x, y, _ = next(iter(data.train_dataloader()))
    assert x.shape == (40, *data.input_shape) == (40, 3, 4, 6)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)
    assert y.tolist() == [index % 2 for index in indices(data, x)]
    raw = torch.from_numpy(data.load().train.images).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(data.preprocessing[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(x, ((raw * data.preprocessing["scale"] - mean) / std)[indices(data, x)])


def test_only_training_is_augmented_and_the_seed_decides_how() -> None:
    def run(seed: int) -> tuple[Colours, Watcher]:
        data, module = Colours(batch_size=40, shift=2, flip=True, seed=seed), Watcher()
        fit = trainer()
        fit.fit(module, data)
        fit.test(module, data, verbose=False)
        return data, module

    data, module = run(0)
    plain = Colours(batch_size=40)
    torch.testing.assert_close(torch.cat(module.seen["test"]), torch.cat([x for x, _ in plain.test_dataloader()]))
    validated = torch.cat([x for x, _ in plain.val_dataloader()])
    for x in module.seen["val"]:
        torch.testing.assert_close(x, validated)
    trained = module.seen["train"][0]
    assert not torch.equal(trained, next(iter(plain.train_dataloader()))[0])
    assert torch.equal(trained, run(0)[1].seen["train"][0])
    assert not torch.equal(trained, run(1)[1].seen["train"][0])
    background = torch.tensor([-m / s for m, s in zip(data.preprocessing["mean"], data.preprocessing["std"])])
    assert torch.isclose(trained, background[:, None, None]).all(dim=1).any()  # no raw pixel but the first ones is 0


def test_held_out_is_the_beginning_of_validation() -> None:
    data = Colours(batch_size=5)
    assert indices(data, data.held_out(7)) == list(range(40, 47))
    assert indices(data, data.held_out(1000)) == list(range(40, 52))


def test_one_sample_is_a_row_of_a_batch() -> None:
    data = Colours()
    dataset = data.val_dataloader().dataset
    x, y = dataset[3]
    assert (x.shape, int(y)) == ((3, 4, 6), 1)
    assert torch.equal(x, data.held_out(4)[3])


def test_loads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Colours()
    data.setup("fit")
    monkeypatch.setattr(data, "load", None)
    data.setup("test")
    assert len(data.test_dataloader().dataset) > 0  # type: ignore[arg-type]


def test_refuses_bad_arguments() -> None:
    with pytest.raises(RecipeError, match=r"data\.batch_size: expected a positive number, got 0"):
        Colours(batch_size=0)
    with pytest.raises(RecipeError, match=r"data\.shift: expected 0 or more pixels, got -1"):
        Colours(shift=-1)
    with pytest.raises(RecipeError, match=r"data\.num_workers: expected 0 or more, got -1"):
        Colours(num_workers=-1)
    with pytest.raises(DataError, match="expected one label for each of 3 images, got 2"):
        ImageSplit(np.zeros((3, 2, 2)), np.zeros(2))
