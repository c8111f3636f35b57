from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compress.export.precision import in_precision
from compress.runtime.engines.eager_cuda import mixes_samples, put_channels_last
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


@pytest.mark.parametrize(("dtype", "turned"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_convolutions_in_half_precision_get_channels_last(dtype: torch.dtype, turned: bool) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.deep, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(128, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.deep(self.conv(x).relu())
            return self.fc(x.view(x.shape[0], -1))  # what is not contiguous cannot be viewed so

    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    program = in_precision(export_program(Viewed().eval(), [x[:2]]), dtype)
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    wanted = module(x)
    put_channels_last(module)
    assert torch.allclose(module(x), wanted, atol=1e-2)
    weight = module.get_parameter("conv.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) == turned
