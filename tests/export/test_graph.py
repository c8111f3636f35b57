from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.errors import ExportError
from compress.export.graph import (
    drop_traces,
    flatten_attention,
    input_specs,
    largest_batch,
    rewritten,
    widen_single_channels,
)
from compress.export.passes import clean_up
from compress.export.targets import onnxruntime
from compress.quantize import convert, prepare
from compress.runtime.engines import make_engine
from compress.runtime.manifest import TensorSpec
from compress.surgery.capture import export_program
from tests.export.programs import quantized


class Narrow(nn.Module):
    """One channel at the input and in the middle, the latter read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 1, 3, padding=1)
        self.b = nn.Conv2d(1, 4, 3)
        self.c = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x).relu().mean((2, 3)) - self.c(x).relu().mean((2, 3))


def quantized_program(network: nn.Module, inputs: Tensor) -> torch.export.ExportedProgram:
    prepared = prepare(network.train(), [inputs[:2]], "int8").train()
    prepared(inputs)
    return export_program(convert(prepared.eval()), [inputs[:2]])


def narrow_convolutions(program: torch.export.ExportedProgram) -> int:
    nodes = program.graph_module.graph.nodes
    return sum(n.target is torch.ops.aten.conv2d.default and n.args[1].meta["val"].shape[1] == 1 for n in nodes)


def test_widened_program_gives_the_same_and_has_no_narrow_convolution() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 1, 8, 8)
    program = quantized_program(Narrow(), inputs)
    widened = rewritten(program, widen_single_channels)
    assert narrow_convolutions(program) == 3
    assert narrow_convolutions(widened) == 0
    torch.testing.assert_close(widened.module()(inputs), program.module()(inputs), rtol=0, atol=1e-6)


def test_programs_without_narrow_convolutions_are_left_alone() -> None:
    torch.manual_seed(0)
    wide = quantized_program(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), torch.randn(4, 3, 8, 8))
    assert rewritten(wide, widen_single_channels) is wide
    # Channels of their own per group are not the same as one channel.
    depthwise = quantized_program(nn.Conv2d(4, 4, 3, groups=4), torch.randn(4, 4, 8, 8))
    assert rewritten(depthwise, widen_single_channels) is depthwise


def test_input_specs_say_what_is_dynamic() -> None:
    assert input_specs(quantized().program) == (TensorSpec("x", "float32", (None, 1, 8, 8)),)
    assert largest_batch(quantized().program) == 65535


def test_what_is_captured_anew_keeps_its_largest_batch() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Identity()).eval()
    program = export_program(network, [torch.ones(2, 3)], largest_batch=256)
    cleaned, _ = clean_up(program)
    assert cleaned is not program
    assert largest_batch(cleaned) == 256
    assert largest_batch(rewritten(program, lambda graph_module: 1)) == 256


def test_a_fixed_batch_size_is_refused() -> None:
    program = torch.export.export(nn.Linear(3, 2).eval(), (torch.ones(2, 3),))
    with pytest.raises(ExportError, match="dynamic batch dimension"):
        input_specs(program)


def test_a_program_captured_with_another_layout_is_refused() -> None:
    inputs = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(ExportError, match="contiguous"):
        input_specs(export_program(nn.Conv2d(3, 2, 3).eval(), [inputs]))


def test_no_batch_limit_is_none() -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    assert largest_batch(torch.export.export(nn.Linear(3, 2), (torch.ones(2, 3),), dynamic_shapes=shapes)) is None


def test_traces_go_and_outputs_stay() -> None:
    inputs = quantized().inputs
    program = quantized().program.run_decompositions({})
    assert any("stack_trace" in node.meta for node in program.graph.nodes)
    drop_traces(program)
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)
    assert torch.equal(program.module()(inputs), quantized().program.module()(inputs))


class Blocks(nn.Module):
    """Attention within blocks of tokens, as NesT has it: five dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 2, 3, 4, 8)
        return nn.functional.scaled_dot_product_attention(x, x * 2, x[..., :5], scale=0.3).flatten(1)


def test_attention_of_five_dimensions_gets_four_and_gives_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 192)
    program = export_program(Blocks(), (x[:2],))
    flat = rewritten(program, flatten_attention)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    nodes = [node for node in flat.graph_module.graph.nodes if node.target is attention]
    assert [[len(value.meta["val"].shape) for value in node.all_input_nodes] for node in nodes] == [[4, 4, 4]]
    assert torch.allclose(flat.module()(x), Blocks()(x), atol=1e-6)
    assert rewritten(flat, flatten_attention) is flat
    onnxruntime.build(program, tmp_path / onnxruntime.FILE)
    (found,) = make_engine("onnxruntime", tmp_path / onnxruntime.FILE)([x.numpy()])
    assert torch.allclose(torch.from_numpy(found), Blocks()(x), atol=1e-5)
