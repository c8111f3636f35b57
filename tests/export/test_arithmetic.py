from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from compress.export.arithmetic import recognise
from compress.export.products import products
from compress.export.targets import eager
from compress.surgery.capture import export_program
from tests.export.networks import KINDS, network


def portable(kind: str, folder: Path) -> GraphModule:
    eager.build(network(kind).integers, folder / eager.FILE)
    module = torch.export.load(folder / eager.FILE).module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


def operators(graph_module: GraphModule) -> Counter[str]:
    names = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]
    return Counter(name for name in names if "quantize_per" in name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_are_found_again_in_their_arithmetic(kind: str, tmp_path: Path) -> None:
    before = network(kind).integers
    module = portable(kind, tmp_path)
    inputs = network(kind).inputs
    with torch.no_grad():
        wanted = module(inputs)
    assert not operators(module)
    found = recognise(module)
    original = before.module(check_guards=False)
    assert isinstance(original, GraphModule)
    assert operators(module) == operators(original)
    assert found == operators(original).total() > 0
    with torch.no_grad():
        torch.testing.assert_close(module(inputs), wanted, rtol=0, atol=1e-6)
    again = export_program(module, (inputs[:2],))
    assert [(p.macs, p.quantized) for p in products(again)] == [(p.macs, p.quantized) for p in products(before)]


def test_scales_and_zero_points_are_the_very_numbers(tmp_path: Path) -> None:
    module = portable("cnn", tmp_path)
    recognise(module)
    original = network("cnn").integers.module(check_guards=False)
    assert isinstance(original, GraphModule)

    def constants(graph_module: GraphModule) -> list[tuple[object, ...]]:
        return [node.args[1:] for node in graph_module.graph.nodes if "quantize_per_tensor" in str(node.target)]

    assert constants(module) == constants(original)


def test_floats_are_left_alone(tmp_path: Path) -> None:
    eager.build(network("transformer").program, tmp_path / eager.FILE)
    module = torch.export.load(tmp_path / eager.FILE).module(check_guards=False)
    assert isinstance(module, GraphModule)
    before = len(module.graph.nodes)
    assert recognise(module) == 0
    assert len(module.graph.nodes) <= before
