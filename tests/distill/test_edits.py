"""Activations and what is learned on them live through pruning, quantization and resuming in mid-fit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from compress.data import keyed_loader
from compress.distill import (
    AttentionTransfer,
    Classification,
    ContrastiveRepresentation,
    DistillationLoss,
    Distiller,
    Exits,
    Hint,
    KnowledgeReview,
    SimilarityPreserving,
    SoftTarget,
    VariationalInformation,
)
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.surgery import Captured, RandomStates, ResumePoint, history_of
from tests.networks import Residual, loader, trainer

PAIRS = {"norm1": "norm1", "norm2": "norm2"}


def losses() -> list[DistillationLoss]:
    return [
        SoftTarget(weight=0.5),
        Hint(PAIRS),
        AttentionTransfer(PAIRS),
        SimilarityPreserving({"norm?": "norm?"}, weight=1.0),
        VariationalInformation({"conv1": "conv1"}, weight=0.1),
        KnowledgeReview(PAIRS, channels=4),
        ContrastiveRepresentation({"relu": "relu"}, num_samples=48, negatives=8, dim=4),
        Exits(["norm1"]),
    ]


class Watch(Callback):
    """What happens at each edit and after it."""

    def __init__(self) -> None:
        self.widths: list[tuple[str, int, int]] = []
        self.parts: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        weight = pl_module.get_parameter("losses.1.projectors.0.linear.weight")
        state = trainer.optimizers[0].state
        assert weight.grad is not None
        assert weight in state, "the optimiser has lost what the loss learns"
        assert state[weight]["momentum_buffer"].shape == weight.shape
        kinds = [edit.kind for edit in history_of(pl_module)]
        self.widths.append((kinds[-1] if kinds else "", len(kinds), weight.shape[1]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.parts.append({name: float(value) for name, value in trainer.callback_metrics.items() if "train/" in name})


class Stop(Callback):
    """What Ctrl-C does, in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 2:
            raise KeyboardInterrupt


def fit(folder: Path, *, stop: int | None = None) -> tuple[Distiller, Watch]:
    pl.seed_everything(0, verbose=False)
    watch, path = Watch(), folder / "resume.ckpt"
    module = Distiller(
        Residual(),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        teacher=Residual(12),
        losses=losses(),
    )
    callbacks = [
        StructuredPruning(0.5, schedule="linear", start=0.2, end=0.4, num_edits=2, round_to=4),
        QuantizationAwareTraining(start=0.7),
        watch,
        RandomStates(),
        *([Stop(stop)] if stop is not None else []),
        ResumePoint(path),
    ]
    fit = trainer(max_epochs=10, callbacks=callbacks, enable_checkpointing=True)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        data = keyed_loader(loader(), seed=0)
        fit.fit(module, data, ckpt_path=path if path.exists() else None, weights_only=True)
    return module, watch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Distiller, Watch]:
    return fit(tmp_path_factory.mktemp("whole"))


def test_what_losses_learn_is_cut_along_with_the_student(whole: tuple[Distiller, Watch]) -> None:
    module, watch = whole
    seen = sorted(set(watch.widths), key=lambda entry: entry[1])
    assert [kind for kind, _, _ in seen] == ["", "prune", "prune", "quantize"]
    widths = [width for _, _, width in seen]
    assert widths[0] == 32
    assert widths[0] > widths[1] > widths[2] == widths[3]
    assert isinstance(module.student, Captured)
    assert module.student.get_parameter("conv1.weight").shape[0] == widths[-1]


def test_every_loss_counts_to_the_end(whole: tuple[Distiller, Watch]) -> None:
    _, watch = whole
    names = {f"train/{loss.name}_loss" for loss in losses()} | {"train/task_loss", "train/loss"}
    assert len(watch.parts) == 10
    for parts in watch.parts:
        assert set(parts) == names
        assert all(value == value and abs(value) < 1e6 for value in parts.values())
        assert parts["train/hint_loss"] > 0
    assert watch.parts[-1]["train/loss"] < watch.parts[0]["train/loss"]


@pytest.mark.parametrize("stops", [(1,), (3, 5), (8,)], ids=str)
def test_resuming_is_bit_for_bit(whole: tuple[Distiller, Watch], stops: tuple[int, ...], tmp_path: Path) -> None:
    for epoch in stops:
        fit(tmp_path, stop=epoch)
    again, _ = fit(tmp_path)
    expected, got = whole[0].state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_kept_inputs_of_a_projector_are_those_of_the_kept_channels() -> None:
    """Directly after an edit, a projector gives what it would have given with the removed channels silent."""
    torch.manual_seed(0)
    seen: list[tuple[Tensor, Tensor]] = []

    class Compare(Callback):
        before: Tensor

        def on_before_edit(self, trainer: pl.Trainer, pl_module: Any, edit: Any) -> None:
            weight = pl_module.get_parameter("losses.0.projectors.0.linear.weight")
            kept = edit.data["slices"]["conv1.weight"]["0"]
            self.before = weight.detach()[:, kept].clone()

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if len(history_of(pl_module)) == 1 and not seen:
                weight = pl_module.get_parameter("losses.0.projectors.0.linear.weight")
                seen.append((self.before, weight.detach().clone()))

    module = Distiller(
        Residual(),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        teacher=Residual(12),
        losses=[Hint({"norm1": "norm1"})],
    )
    callbacks = [StructuredPruning(0.5, start=0.5, end=0.5, num_edits=1, round_to=4), Compare()]
    trainer(max_epochs=2, callbacks=callbacks).fit(module, loader())
    ((before, after),) = seen
    assert torch.equal(before, after)


def test_a_layer_that_an_edit_leaves_alone_keeps_its_projector() -> None:
    torch.manual_seed(0)
    module = Distiller(
        Residual(),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 3)),
        losses=[Hint({"fc": "1"})],
    )
    trainer(max_epochs=2, callbacks=[StructuredPruning(0.5, start=0.5, end=0.5, num_edits=1)]).fit(module, loader())
    assert module.get_parameter("losses.0.projectors.0.linear.weight").shape == (5, 3)
