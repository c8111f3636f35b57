from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CaptureError
from compress.surgery import Captured, capture
from tests.networks import Residual, images


def batch_norm_is_training(captured: Captured) -> list[bool]:
    graph = captured.graph_module.graph
    return [bool(node.args[5]) for node in graph.nodes if node.target is torch.ops.aten.batch_norm.default]


def test_graph_equals_network_in_both_modes() -> None:
    torch.manual_seed(0)
    network = Residual()
    twin = copy.deepcopy(network)
    captured = capture(network, [torch.randn(2, 1, 8, 8)])
    x, _ = images(12)
    for mode in (True, False, True):
        torch.manual_seed(1)
        expected = twin.train(mode)(x)
        torch.manual_seed(1)
        assert torch.allclose(captured.train(mode)(x), expected, atol=1e-6)
    assert set(captured.state_dict()) == set(twin.state_dict())
    for name, value in twin.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue  # the graph counts evaluations too; nothing reads it when momentum is a number
        assert torch.allclose(captured.state_dict()[name].float(), value.float(), atol=1e-6), name


def test_parameters_are_shared() -> None:
    network = Residual()
    captured = capture(network, [torch.randn(2, 1, 8, 8)])
    assert [id(p) for p in captured.parameters()] == [id(p) for p in network.parameters()]


def test_mode_follows_the_attribute_even_when_it_is_assigned() -> None:
    captured = capture(Residual(), [torch.randn(2, 1, 8, 8)])
    x, _ = images(4)
    captured.eval()(x)
    assert batch_norm_is_training(captured) == [False] * 3
    for module in captured.modules():
        module.training = True  # what Lightning does after validation
    captured(x)
    assert batch_norm_is_training(captured) == [True] * 3


def test_frozen_batchnorm_keeps_its_statistics_in_training() -> None:
    captured = capture(Residual(), [torch.randn(2, 1, 8, 8)]).train()
    x, _ = images(8)
    captured(x)
    before = captured.state_dict()["norm.running_mean"].clone()
    captured.freeze_batchnorm = True
    captured(x)
    assert torch.equal(before, captured.state_dict()["norm.running_mean"])
    dropout = [n for n in captured.graph_module.graph.nodes if n.target is torch.ops.aten.dropout.default]
    assert [node.args[2] for node in dropout] == [True]


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


@pytest.mark.parametrize("network", [DataDependent(), FixedBatch()])
def test_what_cannot_be_captured_is_named(network: nn.Module) -> None:
    with pytest.raises(CaptureError, match=f"got {type(network).__name__}"):
        capture(network, [torch.ones(2, 3)])
