from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto
from torch import nn
from torch.nn import functional

from compress.export.onnx.activations import quantize_preactivations
from compress.export.onnx.graph import OnnxGraph
from compress.export.parity import check_parity, reference_outputs
from compress.export.targets import onnxruntime
from compress.quantize import calibrate, convert, prepare
from compress.runtime.engines import make_engine
from compress.surgery.capture import export_program
from tests.export.onnx.test_graph import model, node

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


def activated(kind: str, scale: float, zero_point: int, **attributes: float) -> ModelProto:
    return model(
        [
            *(node("DequantizeLinear", f"{name}_q s z", name) for name in ("x", "w")),
            node("Conv", "x w", "y"),
            node(kind, "y", "a", **attributes),
            node("QuantizeLinear", "a s z", "q"),
            node("DequantizeLinear", "q s z", "out"),
        ],
        {"s": np.float32(scale), "z": np.uint8(zero_point), "w_q": np.ones((1, 1, 1, 1), np.uint8)},
        {"x_q": [None, 1, 1, 1]},
    )


@pytest.mark.parametrize(
    ("kind", "function", "scale", "zero_point", "limits", "attributes"),
    [
        ("HardSwish", functional.hardswish, 5 / 255, 20, (-3.0, 4.6), {}),
        ("HardSwish", functional.hardswish, 8 / 255, 127, (-3.0, 4.0), {}),
        ("Gelu", functional.gelu, 5 / 255, 20, (-2.6, 4.6), {}),
        ("Elu", functional.elu, 5 / 255, 51, (-5.0, 4.0), {}),
        ("LeakyRelu", lambda x: functional.leaky_relu(x, 0.1), 0.1, 60, (-59.5, 19.5), {"alpha": 0.1}),
    ],
)
def test_what_is_clipped_changes_no_result(
    kind: str,
    function: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    zero_point: int,
    limits: tuple[float, float],
    attributes: dict[str, float],
) -> None:
    made = activated(kind, scale, zero_point, **attributes)
    graph = OnnxGraph(made)
    assert quantize_preactivations(graph) == 1
    graph.finish()
    between = next(entry for entry in made.graph.node if entry.op_type == "QuantizeLinear" and entry.input[0] == "y")
    found = OnnxGraph(made).range(between)
    assert found is not None
    assert found == pytest.approx(limits, abs=0.4)
    x = torch.linspace(-99, 99, 10_001)
    results = [
        (function(values) / scale + zero_point).round().clamp(0, 255)  # the zero point's rounding shifts the range
        for values in (x, x.clamp(*found))
    ]
    assert (results[0] - results[1]).abs().max() <= 1
    assert quantize_preactivations(OnnxGraph(made)) == 0  # it is done


def test_a_range_that_reaches_much_farther_than_the_result_is_not_rounded_again() -> None:
    made = activated("LeakyRelu", 0.03, 127, alpha=0.01)  # around zero: down to -3.8, which is -380 before it
    assert quantize_preactivations(OnnxGraph(made)) == 0


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


@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_before_a_relu_in_floats_are_in_integers(shape: tuple[int, ...], bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8, bias=bias), nn.ReLU())
    x = torch.randn(shape)
    prepared = prepare(net.eval(), (x,), "int8")
    calibrate(prepared, [(x,)])
    path = tmp_path / onnxruntime.FILE
    census = onnxruntime.build(export_program(convert(prepared.eval()), (x,)), path)
    assert (census.int8_kernels, census.float_kernels) == (2, 0), census
    found = check_parity(make_engine("onnxruntime", path), reference_outputs(prepared, [x]), [x])
    assert found.batches.relative_error < 0.02
