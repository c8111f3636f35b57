"""A user's data module whose training batches carry keys, so that a teacher's outputs can be stored for them."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from compress.data.keyed import keyed_loader
from compress.errors import DataError

__all__ = ["KeyedDataModule"]


class KeyedDataModule(LightningDataModule):
    """Another data module with keyed training batches; all else is that module's.

    Args:
        inner: The data module.
        seed: Of the augmentation and of the order of the training samples.
        num_views: Augmented views of each sample; the epochs take turns. Without it, each epoch has its own.

    Raises:
        DataError: when the module changes batches after their transfer to the device, where no key reaches.
    """

    def __init__(self, inner: LightningDataModule, *, seed: int = 0, num_views: int | None = None) -> None:
        super().__init__()
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
            if getattr(type(inner), hook) is not getattr(LightningDataModule, hook):
                raise DataError(
                    f"data: expected a module without {hook}, got one in {type(inner).__name__}. What it draws would "
                    "not be the same when outputs are stored: augment in the dataset, or turn the cache off."
                )
        self.inner = inner
        self.seed = seed
        self.num_views = num_views

    def __getattr__(self, name: str) -> Any:
        # Only what is not found otherwise: labels, preprocessing and whatever else users put there.
        return getattr(self.__dict__["inner"], name) if "inner" in self.__dict__ else super().__getattribute__(name)

    def prepare_data(self) -> None:
        """Prepare what the module prepares."""
        self.inner.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set the module up."""
        self.inner.trainer = self.trainer
        self.inner.setup(stage)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader:
        """Return the module's training loader with keys."""
        return keyed_loader(self.inner.train_dataloader(), seed=self.seed, num_views=self.num_views)

    def val_dataloader(self) -> Any:
        """Return the module's."""
        return self.inner.val_dataloader()

    def test_dataloader(self) -> Any:
        """Return the module's."""
        return self.inner.test_dataloader()
