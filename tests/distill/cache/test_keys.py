"""What is stored for a sample and view belongs to what a loader gives for them, in whatever order and process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from compress.data import keyed_loader
from compress.distill import Classification, Distiller, OutputCache, SoftTarget, freeze, read_batch
from compress.distill.cache import CacheWriter, Field
from compress.errors import DataError
from tests.networks import Residual, images, loader

NUM, VIEWS = 50, 3


class Cropped(Dataset):
    """Images that are shifted and mirrored at random, as torchvision's transforms would."""

    def __init__(self) -> None:
        self.x, self.y = images(NUM)

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[index].roll(int(torch.randint(-2, 3, ())), 2)
        return (x.flip(2) if torch.rand(()) < 0.5 else x), self.y[index]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> OutputCache:
    folder, network = tmp_path_factory.mktemp("cache"), teacher()
    writer = CacheWriter(
        folder, key={}, fields={"outputs": Field((3,), "float32")}, num_samples=NUM, num_views=VIEWS, chunk=16
    )
    in_order = {
        view: torch.cat([network(x) for x, *_ in keyed_loader(DataLoader(Cropped(), batch_size=7), seed=9, view=view)])
        for view in range(VIEWS)
    }
    for view, start, stop in writer.missing():
        writer.write(view, start, {"outputs": in_order[view][start:stop]})
    writer.finish()
    return OutputCache.open(folder, key={})


def teacher() -> torch.nn.Module:
    torch.manual_seed(3)
    return freeze(Residual(8))


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("batch_size", [5, 50])
def test_stored_outputs_are_those_of_the_batch(cache: OutputCache, workers: int, batch_size: int) -> None:
    network = teacher()
    data = DataLoader(Cropped(), batch_size=batch_size, shuffle=True, num_workers=workers)
    keyed = keyed_loader(data, seed=9, num_views=VIEWS)
    orders = []
    for epoch in range(2 * VIEWS):
        keyed.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for x, _, keys in keyed:
            assert torch.allclose(cache.read(keys[:, 0], keys[:, 1])["outputs"], network(x), atol=1e-5)
            assert set(keys[:, 1].tolist()) == {epoch % VIEWS}
        orders.append(keys[:, 0].tolist())
    assert len({tuple(order) for order in orders}) == len(orders)


def test_other_augmentation_does_not_fit_what_is_stored(cache: OutputCache) -> None:
    network = teacher()
    keyed = keyed_loader(DataLoader(Cropped(), batch_size=NUM), seed=10, view=0)
    x, _, keys = next(iter(keyed))
    assert not torch.allclose(cache.read(keys[:, 0], keys[:, 1])["outputs"], network(x), atol=1e-2)


def test_a_distiller_cannot_tell_a_cache_from_its_teacher(cache: OutputCache, tmp_path: Path) -> None:
    def module(what: object) -> Distiller:
        torch.manual_seed(0)
        losses = [SoftTarget(weight=0.5)]
        return Distiller(
            Residual(4).eval(), task=Classification(3), optimizer=torch.optim.Adam, teacher=what, losses=losses
        )

    stored, live = module(cache), module(teacher())
    assert stored.teacher is None
    for batch in keyed_loader(DataLoader(Cropped(), batch_size=16, shuffle=True), seed=9, num_views=VIEWS):
        ours, theirs = (each.objective(each.lesson(batch))[0] for each in (stored, live))
        assert torch.allclose(ours, theirs, atol=1e-5)
    with pytest.raises(DataError, match="batch: expected keys of the samples for a cached teacher, got none"):
        stored.lesson(next(iter(loader())))
    assert read_batch(batch).keys is not None
