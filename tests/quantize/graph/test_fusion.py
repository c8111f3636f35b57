from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import qat_utils

import compress.quantize.pt2e
from compress.quantize import prepare

IMAGE, SERIES = (2, 3, 8, 8), (2, 3, 8)
NETWORKS = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), SERIES),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), IMAGE),
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2), nn.BatchNorm2d(2)),
        IMAGE,
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm2d(3)), IMAGE),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_only_patterns_of_present_convolutions_are_captured_once_and_nothing_else_changes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    network, x = make(), torch.randn(shape)
    captured: list[Any] = []
    capture = qat_utils._get_aten_graph_module_for_pattern

    def counted(*given: Any) -> GraphModule:
        captured.append(given)
        return capture(*given)

    monkeypatch.setattr(qat_utils, "_get_aten_graph_module_for_pattern", counted)
    ours = prepare(copy.deepcopy(network), (x,), "int8")
    num_ours = len(captured)
    captured.clear()
    again = prepare(copy.deepcopy(network), (x,), "int8")
    assert not captured
    monkeypatch.setattr(compress.quantize.pt2e, "fused_kinds_alone", nullcontext)
    theirs = prepare(network, (x,), "int8")

    assert num_ours < len(captured)
    assert str(ours.graph_module.graph) == str(again.graph_module.graph) == str(theirs.graph_module.graph)
    outputs = [prepared.train()(x) for prepared in (ours, again, theirs)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])
    assert qat_utils._fuse_conv_bn_qat_helper.__module__ == qat_utils.__name__  # as it was
