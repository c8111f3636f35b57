"""Quantization in one fit with what else works on the network: teachers made of it, pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from compress.distill import Classification, Distiller, EarlierSelf, SoftTarget
from compress.errors import EditError
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.quantize.fakes.lsq import LearnedFakeQuantize
from compress.surgery import Captured, Edit, history_of
from tests.networks import Residual, images, loader, trainer
from tests.surgery.modules import Foreign


class Before(Callback):
    """Keeps the float network as it is when quantization begins."""

    network: Any = None

    def on_before_edit(self, trainer: pl.Trainer, pl_module: Any, edit: Edit) -> None:
        self.network = copy.deepcopy(pl_module.student).eval()


def test_the_float_self_teaches_while_steps_are_learned() -> None:
    torch.manual_seed(0)
    before = Before()
    module = Distiller(
        Residual(8),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        teacher=EarlierSelf(),
        losses=[SoftTarget(weight=0.5)],
    )
    run = trainer(max_epochs=3, callbacks=[QuantizationAwareTraining(start=0.5, learn_steps=True), before])
    run.fit(module, loader())
    x, _ = images(16, seed=1)
    assert isinstance(module.student, Captured)
    assert module.teacher is not None
    assert not isinstance(module.teacher, Captured)
    with torch.no_grad():
        assert torch.equal(module.teacher(x), before.network(x))
    assert run.callback_metrics["train/soft_target_loss"] > 0
    fakes = [m for m in module.student.graph_module.modules() if isinstance(m, LearnedFakeQuantize)]
    assert len(fakes) == 9
    assert all(bool(fake.log_scale.any()) for fake in fakes)


def test_a_quantised_network_is_not_pruned() -> None:
    module = Foreign()
    qat = QuantizationAwareTraining(start=0.2, attribute="net")
    late = StructuredPruning(0.5, schedule="one_shot", start=0.6, end=0.6, attribute="net")
    with pytest.raises(EditError, match=r"history: expected no edit after 'quantize', got 'prune'\. Prune first"):
        trainer(max_epochs=3, callbacks=[qat, late]).fit(module, loader())
    assert [edit.kind for edit in history_of(module)] == ["quantize"]
    assert module.net.get_parameter("conv1.weight").shape[0] == 16
