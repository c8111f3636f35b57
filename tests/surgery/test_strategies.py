"""What a strategy allows: ranks compared by checksums, sharded parameters refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from compress.errors import EditError
from compress.surgery.ranks import check_ranks, checksum
from compress.surgery.relink import check_strategy


@pytest.mark.parametrize("make", [FSDPStrategy, ModelParallelStrategy])
def test_sharded_parameters_are_refused_with_the_way_out(make: Any) -> None:
    name = make.__name__
    with pytest.raises(EditError, match=f"got {name}.*one shot before the fit.*plan_removal.*strategy: ddp"):
        check_strategy(SimpleNamespace(strategy=make()))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy()])
def test_a_device_and_ddp_are_allowed(strategy: Any) -> None:
    check_strategy(SimpleNamespace(strategy=strategy))  # type: ignore[arg-type]


@given(st.data())
def test_a_checksum_sees_every_bit_and_the_order(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.complex64]))
    tensor = torch.arange(1, 7).to(dtype).view(2, 3)
    assert checksum(tensor) == checksum(tensor.clone().t().contiguous().t())
    position = data.draw(st.integers(0, 5))
    other = tensor.clone()
    raw = other.view(-1)[position : position + 1]
    bits = (torch.view_as_real(raw) if raw.is_complex() else raw).view(torch.uint8)
    bits.view(-1)[data.draw(st.integers(0, bits.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(other) != checksum(tensor)
    assert checksum(tensor.flip(0)) != checksum(tensor)


class Ranks:
    """A Trainer of two processes, of which the second has parameters of its own."""

    world_size = 2

    def __init__(self, other: nn.Module) -> None:
        self.other = other
        self.strategy = self
        self.root_device = torch.device("cpu")
        self._numbers: list[Tensor] | None = None

    def all_gather(self, numbers: Tensor) -> Tensor:
        if self._numbers is None:  # the other rank's call of the same function
            self._numbers = []
            check_ranks(SimpleNamespace(world_size=2, strategy=Recorder(self._numbers)), self.other)  # type: ignore[arg-type]
        return torch.stack([numbers, self._numbers.pop(0)])


class Recorder:
    root_device = torch.device("cpu")

    def __init__(self, numbers: list[Tensor]) -> None:
        self.numbers = numbers

    def all_gather(self, numbers: Tensor) -> Tensor:
        self.numbers.append(numbers)
        return numbers[None]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_equal_ranks_pass_whatever_their_statistics() -> None:
    other = network()
    other[1].running_mean.add_(1)  # type: ignore[index, operator, union-attr]
    check_ranks(Ranks(other), network())  # type: ignore[arg-type]


def test_the_first_parameter_that_differs_is_named() -> None:
    other = network()
    with torch.no_grad():
        other[2].weight[1, 3] = torch.nextafter(other[2].weight[1, 3], torch.tensor(9.0))  # type: ignore[index, union-attr]
        other[2].bias += 1  # type: ignore[index, union-attr]
    with pytest.raises(EditError, match=r"same values on all ranks, got different ones in 2\.weight"):
        check_ranks(Ranks(other), network())  # type: ignore[arg-type]


def test_other_shapes_are_named() -> None:
    with pytest.raises(EditError, match="same names and shapes on all ranks"):
        check_ranks(Ranks(nn.Linear(3, 4)), nn.Linear(3, 5))  # type: ignore[arg-type]
