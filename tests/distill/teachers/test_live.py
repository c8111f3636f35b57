from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.distill import Classification, Distiller, Hint, LiveTeacher, SoftTarget, freeze
from compress.errors import DataError, RecipeError
from tests.networks import Residual, images, loader, trainer


def test_it_is_frozen_in_eval_mode_and_without_gradient() -> None:
    teacher = LiveTeacher(Residual(8).train())
    x, _ = images(6)
    answer = teacher(x)
    assert not answer.requires_grad
    assert torch.equal(answer, teacher(x))  # no dropout, no batch statistics
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_bfloat16_casts_a_copy_once() -> None:
    torch.manual_seed(0)
    network, (x, _) = freeze(Residual(8)), images(24)
    teacher = LiveTeacher(network, precision="bf16")
    assert network.get_parameter("conv1.weight").dtype == torch.float32
    assert teacher.network.get_parameter("conv1.weight").dtype == torch.bfloat16
    assert teacher.network.get_parameter("norm1.weight").dtype == torch.float32
    answer, exact = teacher(x), network(x)
    assert answer.dtype == torch.bfloat16
    assert torch.allclose(answer.float(), exact, atol=0.05 * float(exact.abs().max()))
    assert not torch.equal(answer.float(), exact)


def test_fp32_within_a_bfloat16_trainer() -> None:
    network, (x, _) = Residual(8), images(6)
    teacher = LiveTeacher(network, precision="fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher(x).dtype == torch.float32
        assert LiveTeacher(network)(x).dtype == torch.bfloat16


def test_channels_last_changes_nothing_but_the_layout() -> None:
    torch.manual_seed(0)
    network, (x, _) = Residual(8), images(6)
    expected = LiveTeacher(copy.deepcopy(network))(x)
    assert torch.allclose(LiveTeacher(network, channels_last=True)(x), expected, atol=1e-5)
    assert network.get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_teacher_says_the_same_and_its_layers_can_be_tapped(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, (x, y) = Residual(8), images(12)
    # The compiler's front end alone: the code that it would generate is tested by torch.
    monkeypatch.setattr(network, "compile", lambda: nn.Module.compile(network, backend="eager"))
    expected = copy.deepcopy(freeze(network))(x)
    teacher = LiveTeacher(network, compile=True)
    assert torch.allclose(teacher(x), expected, atol=1e-5)
    student = Residual(8)
    module = Distiller(
        student,
        task=Classification(3),
        optimizer=torch.optim.Adam,
        teacher=teacher,
        losses=[SoftTarget(weight=0.5), Hint({"norm1": "norm1"})],
    )
    module.prepare(lambda: (x, y))
    view = module.lesson((x, y)).teachers[0]
    assert torch.allclose(view.outputs, expected, atol=1e-5)
    assert view.features["norm1"].shape == (12, 16, 8, 8)


class Broken(nn.Module):
    """Is not finite from its third call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        answer = torch.zeros(len(x), 3)
        answer[0, 1] = torch.nan if self.calls > 2 else 0.0
        return answer


def test_answers_that_are_not_finite() -> None:
    module = Distiller(
        Residual(4), task=Classification(3), optimizer=torch.optim.Adam, teacher=Broken(), losses=[SoftTarget()]
    )
    with pytest.raises(
        DataError, match="teacher: expected finite outputs, got 1 of 36 values that are NaN or infinite"
    ):
        trainer(max_epochs=1).fit(module, loader())


def test_an_unknown_precision() -> None:
    with pytest.raises(RecipeError, match=r"teacher\.precision: expected bf16 or fp32, got 'int4'"):
        LiveTeacher(nn.Linear(2, 2), precision="int4")
