from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from compress.distill import Classification, Distiller, SoftTarget
from compress.errors import RecipeError
from tests.networks import Residual, images, loader, trainer


def make(teacher: nn.Module | None = None, weights: tuple[float, ...] = ()) -> Distiller:
    return Distiller(
        Residual(8),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        teacher=teacher,
        losses=[SoftTarget(weight=weight) for weight in weights],
    )


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    module = make(Residual(8), (0.7,))
    fit = trainer(max_steps=1)
    fit.fit(module, loader())
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    expected = 0.7 * logged["train/soft_target_loss"] + 0.3 * logged["train/task_loss"]
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert logged["train/soft_target_loss"] > 0


def test_teacher_stays_out_of_everything_and_does_not_change() -> None:
    torch.manual_seed(0)
    teacher = Residual(8)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    module = make(teacher, (0.5,))
    trainer(max_epochs=1).fit(module, loader())
    assert not any("teacher" in name for name in module.state_dict())
    assert not any(part is teacher for part in module.modules())
    optimised = {id(parameter) for group in module.optimizers().param_groups for parameter in group["params"]}  # type: ignore[union-attr]
    assert not optimised & {id(parameter) for parameter in teacher.parameters()}
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)


def test_a_student_learns_from_its_teacher_alone() -> None:
    torch.manual_seed(0)
    module = make(Residual(8), (1.0,))
    batch = images()

    def distance() -> float:
        return float(module.losses[0](module.lesson(batch)))

    first = distance()
    trainer(max_epochs=15).fit(module, loader())
    assert distance() < 0.5 * first


def test_mistakes_are_named() -> None:
    with pytest.raises(
        RecipeError,
        match=r"distill\.losses: expected weights of losses between outputs that sum to at most 1, got 1\.2",
    ):
        make(Residual(8), (0.6, 0.6))
    with pytest.raises(RecipeError, match="teacher: expected a network"):
        make(None, (0.5,))
    with pytest.raises(RecipeError, match="temperature: expected a value above 0"):
        SoftTarget(temperature=0)
