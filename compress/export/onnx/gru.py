"""A GRU with integer weights in an ONNX file as matrix products in integers.

ONNX Runtime has no GRU on integers. The product with the inputs is one for all steps; that with the hidden state is in
a ``Scan``, step by step. Both take int8 weights with a scale for each row, and quantise the other factor to uint8 by
its extremes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.export.onnx.graph import OnnxGraph

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["DOMAIN", "Rows", "scan_gru"]

DOMAIN = "com.microsoft"
"""Of ONNX Runtime's own operators."""

_REVERSED = {b"forward": (0,), b"reverse": (1,), b"bidirectional": (0, 1)}
_KNOWN = {"hidden_size", "direction", "layout", "linear_before_reset"}


@dataclass(frozen=True)
class Rows:
    """A weight as integers.

    Args:
        values: int8, shape (directions, rows, columns).
        scales: Of the rows, float32, shape (directions, rows).
    """

    values: np.ndarray
    scales: np.ndarray

    def product(self, direction: int, bias: np.ndarray) -> list[np.ndarray]:
        """Return what ``DynamicQuantizeMatMul`` multiplies by, scales and zero points of its columns, and the bias."""
        scales = self.scales[direction]
        values = np.ascontiguousarray(self.values[direction].T)
        return [values, scales, np.zeros(scales.shape, np.int8), bias.astype(np.float32)]


def scan_gru(graph: OnnxGraph, node: NodeProto, weights: tuple[Rows, Rows], biases: np.ndarray | None) -> bool:
    r"""Replace a GRU, of any number of steps and in one or both directions.

    .. math:: z, r = \sigma(W_{zr} x + U_{zr} h + b_{zr}), \quad
              n = \tanh(W_n x + b_n + r (U_n h + c_n)), \quad h' = n + z (h - n)

    Args:
        graph: Changed in place.
        node: One whose reset gate multiplies the product with the state, as in torch.
        weights: Of the inputs (directions, 3 * hidden, inputs) and of the state (directions, 3 * hidden, hidden).
        biases: Of the inputs and of the state, shape (directions, 6 * hidden); ``None`` for none.

    Returns:
        Whether it was: not where it uses what torch's GRU does not have.
    """
    from onnx import helper

    given = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if set(given) - _KNOWN or not given.get("linear_before_reset") or given.get("layout"):
        return False
    if len(node.input) < 6 or node.input[4] or not node.input[5]:  # lengths of its samples, or no state to begin with
        return False
    if biases is None:
        biases = np.zeros((len(weights[0].values), 2 * weights[0].values.shape[1]))
    reversals = _REVERSED[given.get("direction", b"forward")]
    name = next(output for output in node.output if output)
    made = [
        new
        for direction, is_reversed in enumerate(reversals)
        for new in _direction(graph, node, weights, biases, direction, is_reversed, f"{name}_{direction}")
    ]
    for output, part, axis in zip(node.output, ("steps", "last"), (1, 0)):  # (L, D, N, H) and (D, N, H)
        if output:
            parts = [f"{name}_{direction}_{part}" for direction in range(len(reversals))]
            made.append(helper.make_node("Concat", parts, [output], axis=axis))
    place = next(index for index, other in enumerate(graph.nodes) if other is node)
    graph.nodes[place : place + 1] = made
    graph.makers.update({output: new for new in made for output in new.output})
    return True


def _direction(
    graph: OnnxGraph,
    node: NodeProto,
    weights: tuple[Rows, Rows],
    biases: np.ndarray,
    direction: int,
    is_reversed: int,
    name: str,
) -> Iterable[NodeProto]:
    """Return nodes that make ``name_steps`` (L, 1, N, H) and ``name_last`` (1, N, H)."""
    from onnx.helper import make_node

    hidden = weights[1].values.shape[2]
    of_inputs, of_state = np.split(biases[direction], 2)
    gates = np.arange(3 * hidden) < 2 * hidden  # the candidate's are apart: the reset gate comes between them
    factors = weights[0].product(direction, of_inputs + np.where(gates, of_state, 0))
    body = _step(weights[1].product(direction, np.where(gates, 0, of_state)), hidden, name)
    constants = [graph.constant(f"{name}_factor{index}", value) for index, value in enumerate(factors)]
    sizes = graph.constant(f"{name}_sizes", np.array([2 * hidden, hidden]))
    which = graph.constant(f"{name}_which", np.array(direction))
    axes = [graph.constant(f"{name}_axis{axis}", np.array([axis])) for axis in (0, 1)]
    parts = [f"{name}_gates", f"{name}_candidates"]
    return [
        make_node("DynamicQuantizeMatMul", [node.input[0], *constants], [f"{name}_products"], domain=DOMAIN),
        make_node("Split", [f"{name}_products", sizes], parts, axis=2),
        make_node("Gather", [node.input[5], which], [f"{name}_first"], axis=0),
        make_node(
            "Scan",
            [f"{name}_first", *parts],
            [f"{name}_final", f"{name}_states"],
            body=body,
            num_scan_inputs=2,
            scan_input_directions=[is_reversed, is_reversed],
            scan_output_directions=[is_reversed],
        ),
        make_node("Unsqueeze", [f"{name}_states", axes[1]], [f"{name}_steps"]),
        make_node("Unsqueeze", [f"{name}_final", axes[0]], [f"{name}_last"]),
    ]


def _step(factors: Sequence[np.ndarray], hidden: int, name: str) -> GraphProto:
    """Return one step: from a state (N, H) and its products with the inputs (N, 2H) and (N, H) to the next state."""
    from onnx import TensorProto, numpy_helper
    from onnx.helper import make_graph, make_node, make_tensor_value_info

    def own(values: str) -> list[str]:
        return [f"{name}_step_{value}" for value in values.split()]

    nodes = [make_node(kind, own(inputs), own(outputs), **more) for outputs, kind, inputs, more in _STEP]
    constants = dict(zip(own("weight scale zero bias"), factors))
    constants |= zip(own("sizes halves"), (np.array([2 * hidden, hidden]), np.array([hidden, hidden])))
    stored = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    inputs, outputs = (
        [make_tensor_value_info(value, TensorProto.FLOAT, None) for value in own(values)]
        for values in ("state gates candidate", "next output")
    )
    return make_graph(nodes, f"{name}_step", inputs, outputs, stored)


# Outputs, operator, inputs and attributes.
_STEP: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("product", "DynamicQuantizeMatMul", "state weight scale zero bias", {"domain": DOMAIN}),
    ("product_gates product_candidate", "Split", "product sizes", {"axis": 1}),
    ("gates_sum", "Add", "product_gates gates", {}),
    ("opened", "Sigmoid", "gates_sum", {}),
    ("update reset", "Split", "opened halves", {"axis": 1}),
    ("kept", "Mul", "reset product_candidate", {}),
    ("candidate_sum", "Add", "kept candidate", {}),
    ("new", "Tanh", "candidate_sum", {}),
    ("difference", "Sub", "state new", {}),
    ("part", "Mul", "update difference", {}),
    ("next", "Add", "part new", {}),
    ("output", "Identity", "next", {}),
)
