"""What PT2E's x86 quantizer leaves out, although some engine computes it in integers.

ONNX Runtime has an LSTM that computes its products in integers (``DynamicQuantizeLSTM``), and convolutions of
volumes like those of images. A GRU becomes integer products there and, step by step, what stands between them; that
pays where the products are large.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

__all__ = [
    "FEWEST_UNITS",
    "PRODUCTS",
    "RECURRENT",
    "annotate_rest",
    "is_product",
    "is_small",
    "layer_of",
    "lookups",
    "products",
    "weights_of",
]

_aten = torch.ops.aten
_NOTE = "quantization_annotation"

RECURRENT = frozenset({_aten.lstm.input, _aten.gru.input})
"""Those among ``PRODUCTS`` whose inputs are quantised by the engine, step by step."""

PRODUCTS = RECURRENT | frozenset(
    {
        _aten.conv1d.default,
        _aten.conv2d.default,
        _aten.conv3d.default,
        _aten.linear.default,
    }
)
"""Operators with weights that can become integers."""

FEWEST_UNITS = 256
"""Of a GRU in integers; with 128, ONNX Runtime takes longer than in float32 (``scripts/bench/RESULTS.md``)."""


def annotate_rest(graph_module: GraphModule, config: Any, keep: Collection[str] = ()) -> None:
    """Note on each layer that no note stands on yet what of it shall be fake-quantised.

    Args:
        graph_module: After the quantizer has been through it.
        config: PT2E's configuration, whose specifications of activations and weights are used.
        keep: Names of layers that stay in floating point.
    """
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    for node in graph_module.graph.nodes:
        find = _FACTORS.get(node.target)
        if find is None or is_small(node) or layer_of(node) in keep or node.meta.get(_NOTE) is not None:
            continue
        activations, weights = find(node)
        noted = {**dict.fromkeys(activations, config.input_activation), **dict.fromkeys(weights, config.weight)}
        if noted and all(spec is not None for spec in noted.values()):
            node.meta[_NOTE] = QuantizationAnnotation(input_qspec_map=noted, _annotated=True)


def products(graph_module: GraphModule) -> list[Node]:
    """Return the nodes with weights that can become integers to advantage, in the order in which they compute."""
    return [node for node in graph_module.graph.nodes if is_product(node)]


def lookups(graph_module: GraphModule) -> list[Node]:
    """Return the embeddings whose table is a parameter of floats, as it stands when it is looked up."""
    return [
        node
        for node in graph_module.graph.nodes
        if node.target is _aten.embedding.default
        and node.args[0].op == "get_attr"
        and node.meta["val"].is_floating_point()
        and not _is_normalised(node.args[0])
    ]


def _is_normalised(table: Node) -> bool:
    """Say whether rows are shortened when they are looked up (``max_norm``)."""
    readers = [reader for user in table.users for reader in (user, *user.users)]
    return any(reader.target is _aten.embedding_renorm_.default for reader in readers)


def is_product(node: Node) -> bool:
    """Say whether a node has weights that can become integers to advantage."""
    return node.target in PRODUCTS and not is_small(node)


def is_small(node: Node) -> bool:
    """Say whether a node is a GRU of too few units to gain by integers."""
    return node.target is _aten.gru.input and node.meta["val"][1].shape[-1] < FEWEST_UNITS


def layer_of(node: Node) -> str:
    """Return the module of the user's network whose code calls an operator."""
    names = [name for name, _ in (node.meta.get("nn_module_stack") or {"": ("", None)}).values()]
    return str(names[-1])


def weights_of(node: Node) -> list[Any]:
    """Return the weights that a node of ``PRODUCTS`` multiplies by."""
    if node.target not in RECURRENT:
        return [node.args[1]]
    given: tuple[Any, ...] = node.args
    parameters, biased, layers, bidirectional = given[2], given[3], given[4], given[7]
    num = len(parameters) // (layers * (2 if bidirectional else 1))
    # Input weights, hidden weights, their biases; see torch.nn.LSTM and torch.nn.GRU.
    return [entry for place, entry in enumerate(parameters) if not (biased and place % num in (2, 3))]


def _recurrent(node: Node) -> tuple[list[Node], list[Node]]:
    """The inputs are quantised by the engine, step by step."""
    return [], weights_of(node)


def _volume(node: Node) -> tuple[list[Node], list[Node]]:
    return [node.args[0]], [node.args[1]]  # type: ignore[list-item]


def _sum(node: Node) -> tuple[list[Node], list[Node]]:
    """What is added to a convolution of volumes, which an integer kernel can add only in integers."""
    terms = [term for term in node.args if isinstance(term, Node)]
    shapes = {str(tuple(each.meta["val"].shape)) for each in (node, *terms)}
    if len(terms) != 2 or len(shapes) != 1:
        return [], []
    made = [term for term in terms if term.target in _MAKE_VOLUMES and term.meta["val"].dim() == 5]
    return [term for term in terms if term is not made[0]] if made else [], []


_MAKE_VOLUMES = (_aten.conv3d.default, _aten.batch_norm.default)
_FACTORS: dict[Any, Callable[[Node], tuple[list[Node], list[Node]]]] = {
    **dict.fromkeys(RECURRENT, _recurrent),
    _aten.conv3d.default: _volume,
    _aten.add.Tensor: _sum,
    _aten.add_.Tensor: _sum,
}
