from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.export.onnx_activations import quantize_preactivations
from compress.export.onnx_graph import OnnxGraph
from compress.export.parity import check_parity, reference_outputs
from compress.export.targets import onnxruntime
from compress.quantize import calibrate, convert, prepare
from compress.runtime.engines import make_engine
from compress.surgery.capture import export_program
from tests.export.test_onnx_graph import model, node

SMOOTH: dict[str, Callable[[], nn.Module]] = {
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
}


@pytest.mark.parametrize("name", SMOOTH)
def test_convolutions_before_smooth_activations_are_in_integers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = SMOOTH[name]
    layers = [nn.Conv2d(3, 16, 3), make(), nn.Conv2d(16, 16, 3, groups=16), make(), nn.Flatten(), nn.Linear(400, 4)]
    net = nn.Sequential(*layers).eval()
    inputs = torch.randn(16, 3, 9, 9) * 2
    prepared = prepare(net, (inputs[:2],), "int8")
    calibrate(prepared, [(inputs,)])
    path = tmp_path / onnxruntime.FILE
    census = onnxruntime.build(export_program(convert(prepared.eval()), (inputs[:2],)), path)
    assert (census.int8_kernels, census.float_kernels) == (3, 0), census
    found = check_parity(make_engine("onnxruntime", path), reference_outputs(prepared, [inputs]), [inputs])
    assert found.batches.relative_error < 0.05


@pytest.mark.parametrize(
    ("kind", "function", "low", "high"),
    [("HardSwish", functional.hardswish, -3.0, 4.6), ("Gelu", functional.gelu, -3.0, 4.6)],
)
def test_what_is_clipped_changes_no_result(
    kind: str, function: Callable[[torch.Tensor], torch.Tensor], low: float, high: float
) -> None:
    made = model(
        [
            *(node("DequantizeLinear", f"{name}_q s z", name) for name in ("x", "w")),
            node("Conv", "x w", "y"),
            node(kind, "y", "a"),
            node("QuantizeLinear", "a s z", "q"),
            node("DequantizeLinear", "q s z", "out"),
        ],
        {"s": np.float32(5 / 255), "z": np.uint8(20), "w_q": np.ones((1, 1, 1, 1), np.uint8)},
        {"x_q": [None, 1, 1, 1]},
    )
    graph = OnnxGraph(made)
    assert quantize_preactivations(graph) == 1
    graph.finish()
    between = next(entry for entry in made.graph.node if entry.op_type == "QuantizeLinear" and entry.input[0] == "y")
    limits = OnnxGraph(made).range(between)
    assert limits is not None
    assert limits[0] == pytest.approx(low, abs=0.35)
    assert limits[1] == pytest.approx(high, abs=0.1)
    top = torch.tensor(5.0 / 255 * (255 - 20))
    assert float(function(torch.tensor(limits[1] + 0.1))) > float(top) - 0.1
    assert quantize_preactivations(OnnxGraph(made)) == 0  # it is done


def test_other_readers_keep_a_convolution_as_it_is() -> None:
    made = model(
        [
            *(node("DequantizeLinear", f"{name}_q s z", name) for name in ("x", "w")),
            node("Conv", "x w", "y"),
            node("HardSwish", "y", "a"),
            node("Add", "a y", "out"),
        ],
        {"s": np.float32(0.1), "z": np.uint8(0), "w_q": np.ones((1, 1, 1, 1), np.uint8)},
        {"x_q": [None, 1, 1, 1]},
    )
    assert quantize_preactivations(OnnxGraph(made)) == 0
