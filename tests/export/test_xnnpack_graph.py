"""Rewritings for XNNPACK, seen by what the rewritten graph computes and which nodes it has."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from compress.export import xnnpack_graph
from compress.export.passes import clean_up
from compress.quantize import calibrate, convert, prepare
from compress.surgery.capture import export_program
from tests.export.networks import network


def converted(module: nn.Module, inputs: Tensor, scheme: str = "int8_portable") -> GraphModule:
    prepared = prepare(module.eval(), (inputs[:2],), scheme)
    calibrate(prepared, [(inputs,)])
    program, _ = clean_up(export_program(convert(prepared.eval()), (inputs[:2],)))
    return program.module(check_guards=False)


def count(graph_module: GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")


def dtypes(graph_module: GraphModule) -> set[torch.dtype]:
    return {
        node.args[5]
        for node in graph_module.graph.nodes
        if "quantized_decomposed.quantize_per_tensor.default" in str(node.target)
    }


class Branch(nn.Module):
    """A sum one of whose sides PT2E leaves in floats, since oneDNN adds it on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return F.relu(self.head(F.relu(self.body(x) + x)))


@pytest.mark.parametrize(("scheme", "zero_point"), [("int8_portable", 0), ("int8", None)])
def test_shifted_activations_stand_for_the_same_numbers(scheme: str, zero_point: int | None) -> None:
    made = network("cnn", scheme)
    graph_module = made.integers.module(check_guards=False)
    wanted = graph_module(made.inputs)
    assert dtypes(graph_module) == {torch.uint8}
    assert xnnpack_graph.sign_activations(graph_module) == 6
    graph_module.recompile()
    assert torch.equal(graph_module(made.inputs), wanted)
    assert dtypes(graph_module) == {torch.int8}
    if zero_point is not None:
        found = {node.args[2] for node in graph_module.graph.nodes if "quantize_per_tensor" in str(node.target)}
        assert found == {zero_point}


def test_a_branch_of_a_sum_is_quantised_without_clipping_what_counts() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(16, 3, 6, 6)
    graph_module = converted(Branch(), inputs)
    wanted = graph_module(inputs)
    before = count(graph_module)
    assert xnnpack_graph.split_dequantizers(graph_module)
    assert xnnpack_graph.quantize_branches(graph_module) == 1
    graph_module.recompile()
    name = "quantized_decomposed.quantize_per_tensor.default"
    assert count(graph_module)[name] == before[name] + 1
    assert float((graph_module(inputs) - wanted).norm() / wanted.norm()) < 0.02


def test_a_result_in_floats_comes_of_an_input_quantised_by_its_own_range() -> None:
    made = network("transformer")
    graph_module = made.integers.module(check_guards=False)
    wanted = graph_module(made.inputs)
    assert xnnpack_graph.quantize_inputs(graph_module) == 5
    graph_module.recompile()
    assert count(graph_module)["quantized_decomposed.choose_qparams.tensor"] == 5
    assert float((graph_module(made.inputs) - wanted).norm() / wanted.norm()) < 0.03


def test_few_bits_are_clipped_once_on_the_way_out() -> None:
    made = network("cnn", "w4a4")
    graph_module = made.integers.module(check_guards=False)
    wanted = graph_module(made.inputs)
    assert xnnpack_graph.clip_few_bits(graph_module) == 2
    assert xnnpack_graph.widen_weights(graph_module) == 2
    graph_module.recompile()
    assert torch.equal(graph_module(made.inputs), wanted)
    found = count(graph_module)
    assert (found["aten.hardtanh.default"], found["aten.relu.default"], found["aten.clamp.default"]) == (2, 1, 0)


def test_silent_channels_get_a_scale_that_their_bias_fits() -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        first.weight[1] = 0
    module = nn.Sequential(first, nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU())
    inputs = torch.randn(8, 2, 4, 4)
    graph_module = converted(module, inputs)
    wanted = graph_module(inputs)
    assert xnnpack_graph.revive_channels(graph_module) == 1
    graph_module.recompile()
    assert torch.equal(graph_module(inputs), wanted)
    weight = next(node for node in graph_module.graph.nodes if "dequantize_per_channel" in str(node.target))
    integers, scales, zero_points = (getattr(graph_module, str(value.target)) for value in weight.args[:3])
    assert not integers[1].any()
    assert not zero_points.any()
    assert scales[1] == scales.max()


def test_what_has_no_kernel_of_integers_keeps_its_numbers_as_floats() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Tanh())
    inputs = torch.randn(8, 3, 5, 5)
    graph_module = converted(module, inputs)
    wanted = graph_module(inputs)
    assert xnnpack_graph.rewrite(graph_module)
    found = count(graph_module)
    # The first goes on in integers; the second, depthwise and into a tanh, has no such kernel.
    assert found["quantized_decomposed.dequantize_per_channel.default"] == 1
    assert found["quantized_decomposed.choose_qparams.tensor"] == 0
    assert float((graph_module(inputs) - wanted).norm() / wanted.norm()) < 1e-5


def test_a_float_program_is_left_alone() -> None:
    assert xnnpack_graph.rewrite(network("cnn").program.module(check_guards=False)) == 0
