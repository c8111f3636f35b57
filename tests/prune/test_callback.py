from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from compress.errors import EditError, RecipeError
from compress.prune import StructuredPruning
from compress.surgery import history_of
from tests.networks import Residual, loader


class Foreign(pl.LightningModule):
    """A user's own module that knows nothing of us."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)]


class Watch(Callback):
    """Checks after each step that every weight has moved."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self.stuck: list[str] = []
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.widths.append(pl_module.backbone.conv1.out_channels)  # type: ignore[union-attr, arg-type]
        self.stuck += [n for n, p in pl_module.named_parameters() if torch.equal(p, self._before[n])]


def fit(module: pl.LightningModule, *callbacks: Callback, **arguments: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **arguments,
    )
    trainer.fit(module, loader())
    return trainer


def pruning(**changes: Any) -> StructuredPruning:
    values = {"start": 0.2, "end": 0.6, "num_edits": 3, "round_to": 4, "schedule": "linear", **changes}
    return StructuredPruning(0.5, attribute="backbone", **values)


def test_a_foreign_module_shrinks_in_steps_and_all_weights_move() -> None:
    torch.manual_seed(0)
    module, watch = Foreign(Residual()), Watch()
    trainer = fit(module, pruning(), watch)
    assert sorted(set(watch.widths), reverse=True) == [32, 28, 20, 16]
    assert watch.stuck == []
    assert history_of(module).count("prune") == 3
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_accumulated_gradients_are_not_lost_in_an_edit() -> None:
    torch.manual_seed(0)
    module = Foreign(Residual())
    fit(module, pruning(), accumulate_grad_batches=2)
    assert module.backbone.conv1.out_channels == 16  # type: ignore[union-attr]


def test_one_shot_removes_everything_at_once() -> None:
    module, watch = Foreign(Residual()), Watch()
    fit(module, pruning(schedule="one_shot"), watch)
    assert sorted(set(watch.widths), reverse=True) == [32, 16]


def test_nothing_pruned_is_an_error() -> None:
    with pytest.raises(EditError, match=r"expected something to remove at ratio 0\.5, got nothing"):
        fit(Foreign(Residual()), pruning(round_to=64))


def test_wrong_attribute_lists_the_right_ones() -> None:
    with pytest.raises(EditError, match="Its networks are: backbone"):
        fit(Foreign(Residual()), StructuredPruning(attribute="modle"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"prune\.ratio: expected a value in \[0, 1\), got 1\.0"),
        ({"ratio": -0.1}, r"prune\.ratio"),
        ({"schedule": "quadratic"}, r"prune\.schedule: expected one of cubic, linear, one_shot"),
        ({"start": 0.6, "end": 0.5}, r"prune\.start, prune\.end"),
        ({"end": 1.0}, r"prune\.start, prune\.end"),
        ({"num_edits": 0}, r"prune\.num_edits"),
        ({"round_to": 0}, r"prune\.round_to"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        StructuredPruning(**arguments)
