from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compress.runtime.engines.eager_cuda import mixes_samples
from compress.surgery.capture import export_program
from tests.export.programs import floating


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "mixes"),
    [
        (lambda x: x / x.amax(), True),
        (lambda x: x - x.mean(0), True),
        (lambda x: x - x.mean(-2), True),
        (lambda x: x - x.max(), True),
        (lambda x: x - x.sum((0, 1)), True),
        (lambda x: x - x.mean(1, keepdim=True), False),
        (lambda x: x - x.amax((1,), keepdim=True), False),
        (lambda x: x.softmax(1), False),
    ],
)
def test_reductions_over_samples_are_found(function: Callable[[Tensor], Tensor], mixes: bool) -> None:
    module = export_program(Applied(function), [torch.ones(2, 3)]).module(check_guards=False)
    assert isinstance(module, GraphModule)
    assert mixes_samples(module) == mixes


def test_a_network_of_samples_does_not_mix_them() -> None:
    module = floating().program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    assert not mixes_samples(module)
