"""Each rewriting on a small hand-made model, run by ONNX Runtime without optimisations of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from compress.export.onnx.graph import (
    OnnxGraph,
    drop_metadata,
    drop_relus,
    mark_narrow,
    narrow_relus,
    pool_globally,
    quantize_biases,
    quantize_branches,
    rewrite,
    split_zero_points,
)
from compress.runtime.engines.onnxruntime import NARROW


def model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    inputs: dict[str, list[Any]],
    *,
    rank: int = 2,
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=f"node_{output}", **attributes)


def run(made: ModelProto, *inputs: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(made)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([entry.name for entry in session.get_inputs()], inputs)))[0]


def kinds(made: ModelProto) -> list[str]:
    return [entry.op_type for entry in made.graph.node]


def applied(made: ModelProto, change: Any) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(made)
    graph = OnnxGraph(copy)
    change(graph)
    graph.finish()
    return copy


def activated(zero_point: int) -> ModelProto:
    return model(
        [node("Relu", "x", "r"), node("QuantizeLinear", "r s z", "q"), node("DequantizeLinear", "q s z", "out")],
        {"s": np.float32(0.1), "z": np.uint8(zero_point)},
        {"x": [None, 4]},
    )


def test_a_relu_goes_where_quantization_clips() -> None:
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    changed = applied(activated(0), drop_relus)
    assert "Relu" not in kinds(changed)
    assert np.array_equal(run(changed, x), run(activated(0), x))


def test_a_relu_stays_where_quantization_does_not_clip() -> None:
    assert "Relu" in kinds(applied(activated(3), drop_relus))


def test_a_symmetric_range_behind_a_relu_gives_up_what_is_below_zero() -> None:
    x = np.random.default_rng(0).normal(size=(99, 4)).astype(np.float32) * 8
    changed = applied(applied(activated(127), narrow_relus), drop_relus)
    assert "Relu" not in kinds(changed)
    wanted = np.clip(x, 0, 0.1 * (255 - 127))  # what it was clipped to
    assert np.abs(run(changed, x) - wanted).max() < 0.51 * 0.1 * 128 / 255
    assert "Relu" in kinds(applied(applied(activated(100), narrow_relus), drop_relus))


@pytest.mark.parametrize(("ceiling", "top"), [(6.0, 6.0), (20.0, 12.8)])
def test_a_symmetric_range_behind_a_relu6_ends_at_its_ceiling(ceiling: float, top: float) -> None:
    x = np.random.default_rng(0).normal(size=(99, 4)).astype(np.float32) * 8
    made = activated(127)
    clip = next(entry for entry in made.graph.node if entry.op_type == "Relu")
    clip.op_type = "Clip"
    for name, value in (("floor", 0.0), ("ceiling", ceiling)):
        clip.input.append(name)
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype=np.float32), name))
    changed = applied(applied(made, narrow_relus), drop_relus)
    assert "Clip" not in kinds(changed)
    assert np.abs(run(changed, x) - np.clip(x, 0, top)).max() < 0.51 * top / 255
    del clip.input[2]  # a ceiling that is not known
    clip.input.append("computed")
    assert "Clip" in kinds(applied(applied(made, narrow_relus), drop_relus))


def pooled(first: str, pool: str, zero_point: int = 127) -> ModelProto:
    """A value that is quantised, pooled, quantised alike, laid flat and quantised alike."""
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]} if pool in ("MaxPool", "AveragePool") else {}
    nodes = [
        node(first, "x", "r"),
        *(node("QuantizeLinear", "r s z", "q1"), node("DequantizeLinear", "q1 s z", "d1")),
        node(pool, "d1", "p", **attributes),
        *(node("QuantizeLinear", "p s z", "q2"), node("DequantizeLinear", "q2 s z", "d2")),
        node("Flatten", "d2", "f"),
        *(node("QuantizeLinear", "f s z", "q3"), node("DequantizeLinear", "q3 s z", "out")),
    ]
    return model(nodes, {"s": np.float32(0.1), "z": np.uint8(zero_point)}, {"x": [None, 2, 4, 4]})


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool", "GlobalAveragePool"])
def test_what_is_pooled_behind_a_relu_is_quantised_alike(pool: str) -> None:
    x = np.random.default_rng(0).normal(size=(9, 2, 4, 4)).astype(np.float32) * 8
    changed = applied(applied(pooled("Relu", pool), narrow_relus), drop_relus)
    assert "Relu" not in kinds(changed)
    graph = OnnxGraph(changed)
    scales = [graph.scale(entry) for entry in graph.nodes if entry.op_type.endswith("izeLinear")]
    assert {(round(float(found[0]), 6), int(found[1])) for found in scales if found} == {(round(12.8 / 255, 6), 0)}
    wanted = run(model([node("Relu", "x", "r"), *_floats(pool)], {}, {"x": [None, 2, 4, 4]}), np.minimum(x, 12.8))
    assert np.abs(run(changed, x) - wanted).max() < 1.02 * 12.8 / 255  # two roundings


def _floats(pool: str) -> list[onnx.NodeProto]:
    attributes = {} if pool.startswith("Global") else {"kernel_shape": [2, 2], "strides": [2, 2]}
    return [node(pool, "r", "p", **attributes), node("Flatten", "p", "out")]


def test_a_pool_of_what_may_be_negative_keeps_its_range() -> None:
    for made in (pooled("Tanh", "MaxPool"), pooled("Relu", "MaxPool", zero_point=100)):
        assert applied(made, narrow_relus) == made


@pytest.mark.parametrize(("largest", "in_body", "marked"), [(64, 64, True), (65, 64, False), (64, 65, False)])
def test_narrow_weights_are_noted_where_all_are(largest: int, in_body: int, marked: bool) -> None:
    def weight(value: int, name: str) -> TensorProto:
        return numpy_helper.from_array(np.array([[value, -3]], dtype=np.int8), name)

    made = activated(0)
    made.graph.initializer.append(weight(largest, "w"))
    body = helper.make_graph([], "body", [], [], [weight(in_body, "inner")])
    made.graph.node.append(helper.make_node("Scan", [], ["loop"], body=body, num_scan_inputs=0))
    mark_narrow(made)
    assert [entry.key for entry in made.metadata_props] == [NARROW] * marked


def test_a_relu_stays_where_something_else_reads_it() -> None:
    made = activated(0)
    made.graph.node.append(node("Add", "out r", "sum"))
    made.graph.output[0].name = "sum"
    assert "Relu" in kinds(applied(made, drop_relus))
    shown = activated(0)
    shown.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [None, 4]))
    assert "Relu" in kinds(applied(shown, drop_relus))


def residual(scale: float, zero_point: int, added: float, added_zero: int) -> ModelProto:
    """Return clip(x @ 1 + s), with both operands and the sum on their grids but the product itself."""
    return model(
        [
            node("Gemm", "x w", "y"),
            node("QuantizeLinear", "t s1 z1", "q1"),
            node("DequantizeLinear", "q1 s1 z1", "d1"),
            node("Add", "y d1", "a"),
            node("QuantizeLinear", "a s2 z2", "q2"),
            node("DequantizeLinear", "q2 s2 z2", "out"),
        ],
        {
            "w": np.eye(4, dtype=np.float32),
            "s1": np.float32(added),
            "z1": np.uint8(added_zero),
            "s2": np.float32(scale),
            "z2": np.uint8(zero_point),
        },
        {"x": [None, 4], "t": [None, 4]},
    )


@settings(deadline=None, max_examples=30)
@given(
    scale=st.floats(0.01, 1),
    zero_point=st.integers(0, 255),
    added=st.floats(0.01, 1),
    added_zero=st.integers(0, 255),
    spread=st.floats(0.1, 1000),
    seed=st.integers(0, 99),
)
def test_a_quantized_branch_changes_the_sum_by_rounding_only_however_large_it_is(
    scale: float, zero_point: int, added: float, added_zero: int, spread: float, seed: int
) -> None:
    made = residual(scale, zero_point, added, added_zero)
    changed = applied(made, quantize_branches)
    assert kinds(changed).count("QuantizeLinear") == 3
    x, t = (np.random.default_rng(seed).normal(size=(2, 50, 4)) * spread).astype(np.float32)
    # Half a step of the branch, whose range is that of sum and summand together, and a step of the sum.
    step = 255 * (np.float32(scale) + np.float32(added)) / 255
    assert np.abs(run(changed, x, t) - run(made, x, t)).max() <= 0.51 * step + 1.01 * scale


def test_a_branch_stays_float_where_the_sum_does() -> None:
    made = residual(0.1, 0, 0.1, 0)
    made.graph.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [None, 4]))
    assert kinds(applied(made, quantize_branches)) == kinds(made)


def layer(bias: list[float], weight: np.ndarray, scales: list[float]) -> ModelProto:
    return model(
        [
            node("QuantizeLinear", "x s z", "q"),
            node("DequantizeLinear", "q s z", "d"),
            node("DequantizeLinear", "w ws wz", "dw", axis=0),
            node("Gemm", "d dw b", "out", transB=1),
        ],
        {
            "s": np.float32(0.02),
            "z": np.uint8(7),
            "w": weight,
            "ws": np.array(scales, np.float32),
            "wz": np.zeros(len(scales), np.int8),
            "b": np.array(bias, np.float32),
        },
        {"x": [None, weight.shape[1]]},
    )


def test_biases_become_int32_and_outputs_stay() -> None:
    weight = np.random.default_rng(0).integers(-127, 127, size=(3, 5)).astype(np.int8)
    made = layer([0.5, -300.0, 0.0], weight, [0.01, 0.02, 0.5])
    changed = applied(made, quantize_biases)
    types = {numpy_helper.to_array(entry).dtype for entry in changed.graph.initializer if "bias_int32" in entry.name}
    assert types == {np.dtype(np.int32)}
    x = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)
    assert np.abs(run(changed, x) - run(made, x)).max() <= 0.02 * 0.5


def test_the_bias_of_a_dead_channel_does_not_overflow() -> None:
    weight = np.array([[5, -3], [0, 0]], np.int8)
    # What PT2E writes for a channel without weights is the least scale there is.
    made = layer([0.5, 20.0], weight, [0.01, 1.2e-7])
    changed = applied(made, quantize_biases)
    x = np.ones((1, 2), np.float32)
    assert np.abs(run(changed, x) - run(made, x)).max() <= 0.02
    assert kinds(changed).count("DequantizeLinear") == 3


def test_a_bias_that_would_overflow_stays_float() -> None:
    made = layer([1e9], np.array([[1, 2]], np.int8), [1e-3])
    assert kinds(applied(made, quantize_biases)) == kinds(made)


@pytest.mark.parametrize(
    ("axes", "keep", "pooled"), [([2, 3], 1, True), ([-1, -2], 1, True), ([2], 1, False), ([2, 3], 0, False)]
)
def test_means_over_the_picture_become_pooling(axes: list[int], keep: int, pooled: bool) -> None:
    made = model(
        [
            node("QuantizeLinear", "x s z", "q"),
            node("DequantizeLinear", "q s z", "d"),
            node("ReduceMean", "d axes", "out", keepdims=keep),
        ],
        {"s": np.float32(0.02), "z": np.uint8(100), "axes": np.array(axes, np.int64)},
        {"x": [None, 3, 4, 4]},
        rank=4 if keep else 4 - len(axes),
    )
    changed = applied(made, pool_globally)
    assert ("GlobalAveragePool" in kinds(changed)) == pooled
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(run(changed, x), run(made, x), atol=1e-6)


def test_volumes_are_not_pooled_as_images_are() -> None:
    made = model(
        [
            *(node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d")),
            node("ReduceMean", "d axes", "out", keepdims=1),
        ],
        {"s": np.float32(0.1), "z": np.uint8(127), "axes": np.array([-2, -1])},
        {"x": [None, 2, 3, 4, 4]},
        rank=5,
    )
    made.graph.value_info.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, [None, 2, 3, 4, 4]))
    assert "GlobalAveragePool" not in kinds(applied(made, pool_globally))


def test_weights_get_zero_points_of_their_own() -> None:
    made = model(
        [
            node("DequantizeLinear", "w1 s z", "d1", axis=0),
            node("DequantizeLinear", "w2 s z", "d2", axis=0),
            node("MatMul", "x d1", "y"),
            node("MatMul", "y d2", "out"),
        ],
        {
            "w1": np.eye(2, dtype=np.int8),
            "w2": np.ones((2, 2), np.int8),
            "s": np.ones(2, np.float32),
            "z": np.zeros(2, np.int8),
        },
        {"x": [None, 2]},
    )
    changed = applied(made, split_zero_points)
    assert len({entry.input[2] for entry in changed.graph.node if entry.op_type == "DequantizeLinear"}) == 2
    assert np.array_equal(run(changed, np.ones((1, 2), np.float32)), run(made, np.ones((1, 2), np.float32)))


def test_notes_of_the_exporter_go() -> None:
    made = activated(0)
    for entry in (made, made.graph, made.graph.node[0], made.graph.initializer[0], made.graph.input[0]):
        entry.metadata_props.add(key="trace", value="/some/path")
        entry.doc_string = "/some/path"
    drop_metadata(made)
    assert b"/some/path" not in made.SerializeToString()


def test_rewriting_a_float_model_changes_no_node() -> None:
    made = model(
        [node("Gemm", "x w b", "y"), node("Relu", "y", "out")],
        {"w": np.eye(2, dtype=np.float32), "b": np.ones(2, np.float32)},
        {"x": [None, 2]},
    )
    before = kinds(made)
    rewrite(made)
    assert kinds(made) == before
