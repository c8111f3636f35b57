from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from compress.export.onnx.graph import OnnxGraph
from compress.export.onnx.weights import (
    dequantised_in_each_call,
    let_constants_fold,
    transpose_weights,
    unsigned_where_shared,
)
from compress.export.targets import onnxruntime as target
from compress.quantize import calibrate, convert, prepare
from compress.runtime.engines import make_engine
from compress.surgery import Captured
from compress.surgery.capture import export_program
from tests.export.onnx.test_graph import kinds, model, node, run


def quantised(network: nn.Module, x: Tensor, scheme: str = "int8") -> Captured:
    prepared = prepare(network.eval(), (x,), scheme)
    calibrate(prepared, [(x,)])
    return convert(prepared.eval())


def built(network: nn.Module, x: Tensor, path: Path, scheme: str = "int8") -> tuple[Captured, ModelProto, Counter[str]]:
    """Return the converted network, its file and the kernels that ONNX Runtime makes of that."""
    converted = quantised(network, x, scheme)
    census = target.build(export_program(converted, (x,)), path)
    return converted, onnx.load(path), Counter(census.details)


def served(path: Path, x: Tensor, *, exact: str) -> np.ndarray:
    """Return what a file gives where ONNX Runtime is asked for exact sums, or not."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", exact)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return result


class Repeated(nn.Module):
    """One layer that is applied three times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x).relu() + 1
        return x


@pytest.mark.parametrize(
    ("layer", "shape", "kernel", "exact"),
    [
        (nn.Linear(8, 8), (4, 8), "QGemm", "0"),
        (nn.Linear(8, 8), (4, 5, 8), "MatMulIntegerToFloat", "1"),
        pytest.param(nn.Linear(8, 8), (4, 8), "QGemm", "1", marks=pytest.mark.slow),
        pytest.param(nn.Linear(8, 8), (4, 5, 8), "MatMulIntegerToFloat", "0", marks=pytest.mark.slow),
    ],
)
def test_layers_that_share_a_weight_are_in_integers_and_load(
    layer: nn.Module, shape: tuple[int, ...], kernel: str, exact: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    converted, loaded, kernels = built(Repeated(layer), x, tmp_path / target.FILE)
    assert kernels[kernel] == 3, kernels
    stored = [numpy_helper.to_array(entry) for entry in loaded.graph.initializer if len(entry.dims) == 2]
    assert [value.dtype for value in stored] == [np.uint8]
    got, expected = served(tmp_path / target.FILE, x, exact=exact), converted(x).detach().numpy()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


class OpenConvolutions(nn.Module):
    """A depthwise convolution whose result goes on in floats, to a LayerNorm, and one that is added to floats."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm([8, 6, 6])
        self.dense = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dense(self.norm(self.depthwise(x))))


def test_no_weight_is_turned_to_floats_in_each_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6)
    converted, loaded, _ = built(OpenConvolutions(), x, tmp_path / target.FILE)
    integers = [entry for entry in loaded.graph.initializer if entry.data_type == onnx.TensorProto.INT8]
    assert sorted(len(entry.dims) for entry in integers) == [4, 4]  # as small as before
    (got,) = make_engine("onnxruntime", tmp_path / target.FILE, num_threads=1)([x.numpy()])
    expected = converted(x).detach().numpy()
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()
    assert left(tmp_path / target.FILE) == {}


@pytest.mark.parametrize("num", [1, 2])
def test_weights_alone_fold_too(num: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4), *[shared, nn.Tanh()] * num)
    x = torch.randn(4, 3, 6, 6)
    converted, _, _ = built(network, x, tmp_path / target.FILE, "int8_weights")
    assert left(tmp_path / target.FILE) == {}
    (got,) = make_engine("onnxruntime", tmp_path / target.FILE, num_threads=1)([x.numpy()])
    assert np.allclose(got, converted(x).detach().numpy(), atol=1e-5)


def test_a_convolution_in_integers_keeps_its_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    _, loaded, kernels = built(network, torch.randn(4, 3, 6, 6), tmp_path / target.FILE)
    assert (kernels["QLinearConv"], kernels["QGemm"]) == (1, 1)
    assert "Cast" not in {entry.op_type for entry in loaded.graph.node}


def test_a_weight_that_found_a_kernel_in_one_place_is_left_alone() -> None:
    made = model(
        [
            *(node("DequantizeLinear", f"{name}_q s z", name) for name in ("x", "w")),
            node("Conv", "x w", "y"),
            node("QuantizeLinear", "y s z", "q"),
            node("DequantizeLinear", "q s z", "h"),
            node("Conv", "h w", "out"),
        ],
        {"s": np.float32(0.5), "z": np.int8(0), "w_q": np.ones((1, 1, 1, 1), np.int8)},
        {"x_q": [None, 1, 1, 1]},
        rank=4,
    )
    assert let_constants_fold(OnnxGraph(made), {"w_q": 1}) == 0


def left(path: Path) -> Counter[str]:
    """Return how often which constants ONNX Runtime, having optimised, dequantises in each call."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dequantised_in_each_call(onnx.load(path.with_suffix(".optimised")))


def test_no_bias_of_such_a_layer_is_left_either(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, loaded, _ = built(OpenConvolutions(), torch.randn(4, 8, 6, 6), tmp_path / target.FILE)
    graph = OnnxGraph(loaded)
    convolutions = [entry for entry in graph.nodes if entry.op_type == "Conv"]
    assert len(convolutions) == 2
    for entry in convolutions:
        assert [graph.maker(name, "DequantizeLinear") for name in entry.input[1:]] == [None, None]


class Twice(nn.Module):
    """One layer, of rows and of their mean: a product and a Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).mean(1))


def test_a_matrix_in_both_directions_loads_where_sums_are_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    converted, _, _ = built(Twice(), x, tmp_path / target.FILE)
    got, expected = served(tmp_path / target.FILE, x, exact="1"), converted(x).detach().numpy()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


def products(weight: np.ndarray, scale: np.ndarray, *, axis: int, num: int = 1) -> ModelProto:
    """Products of ``x`` in floats with the transposed matrix, one behind the other."""
    names = ["x", *[f"h{index}" for index in range(1, num)], "out"]
    return model(
        [
            node("DequantizeLinear", "w_q s z", "w", axis=axis),
            node("Transpose", "w", "t"),
            *(node("MatMul", f"{names[index]} t", names[index + 1]) for index in range(num)),
        ],
        {"s": scale, "z": np.zeros(scale.shape, weight.dtype), "w_q": weight},
        {"x": [None, weight.shape[1]]},
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("fold", [True, False])
def test_numbers_stay(axis: int, fold: bool) -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (3, 3)).astype(np.int8)
    before = products(weight, np.array([0.5, 1.0, 2.0], np.float32), axis=axis, num=2)
    x = np.eye(3, dtype=np.float32)
    expected = run(before, x)
    graph = OnnxGraph(before)
    assert transpose_weights(graph) == 1
    if fold:
        assert let_constants_fold(graph, {"w_q_transposed": 2}) == 1
    graph.finish()
    assert kinds(before) == [*(["Cast", "Mul"] if fold else ["DequantizeLinear"]), "MatMul", "MatMul"]
    assert np.array_equal(run(before, x), expected)


def test_a_shared_weight_in_uint8_is_the_same_numbers() -> None:
    weight = np.array([[-128, 127], [0, 5]], np.int8)
    before = products(weight, np.array([0.5, 2.0], np.float32), axis=0, num=2)
    x = np.array([[1.0, 3.0]], np.float32)
    expected = run(before, x)
    graph = OnnxGraph(before)
    transpose_weights(graph)
    assert unsigned_where_shared(graph) == 1
    graph.finish()
    assert [entry.data_type for entry in before.graph.initializer if len(entry.dims) == 2] == [onnx.TensorProto.UINT8]
    assert np.array_equal(run(before, x), expected)


def test_what_one_layer_reads_stays_signed() -> None:
    graph = OnnxGraph(products(np.ones((2, 2), np.int8), np.ones(2, np.float32), axis=0))
    assert unsigned_where_shared(graph) == 0
