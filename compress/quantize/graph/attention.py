"""Attention's two products in integers: the fused operator spelt out, so that what both multiply can be rounded.

Of queries, keys, values and probabilities each gets a range, as other activations do (Q-BERT, arXiv:1909.05840, and
I-BERT, arXiv:2101.01321, round them, too). Softmax, masks and the scale stay in floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from compress.quantize.graph.annotate import layer_of
from compress.quantize.graph.normalize import emit, parameters_alone, replace, tag
from compress.quantize.schemes import FLOAT, Scheme

__all__ = ["SPELT_OUT", "activation_products", "spell_out_attention"]

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_SUM = _aten.baddbmm.default  # of a mask and a product, as nn.MultiheadAttention has it where it returns its weights
SPELT_OUT = (_aten.matmul.default, _aten.bmm.default)
"""Products whose factors can be rounded."""


def activation_products(graph_module: GraphModule) -> list[Node]:
    """Return the matrix products of two activations, attention in one operator included."""
    fixed = parameters_alone(graph_module)
    return [
        node
        for node in graph_module.graph.nodes
        if node.target in (_ATTENTION, _SUM)
        or (node.target in SPELT_OUT and not any(factor in fixed for factor in node.args[:2]))
    ]


def spell_out_attention(graph_module: GraphModule, schemes: Mapping[str, Scheme]) -> None:
    """Write attention in one operator as two products with a softmax between, where a scheme rounds them, in place.

    Sums of a mask and a product are taken apart, too. Attention whose query heads share key heads stays as it is.

    Args:
        graph_module: Captured and normalised.
        schemes: Of each module.
    """
    whole = [node for node in graph_module.graph.nodes if node.target in (_ATTENTION, _SUM)]
    for node in [node for node in whole if schemes.get(layer_of(node), FLOAT).attention]:
        if node.kwargs.get("enable_gqa", False) or {node.kwargs.get(name, 1) for name in ("alpha", "beta")} != {1}:
            continue
        with graph_module.graph.inserting_before(node):
            replace(node, _spelt_out(node) if node.target is _ATTENTION else _sum(node))
    for node in graph_module.graph.find_nodes(op="call_function", target=_aten.view.default):
        node.target = _aten.reshape.default  # products lie otherwise in memory than what the one operator gives
    graph_module.graph.eliminate_dead_code()
    tag(graph_module)
    graph_module.recompile()


def _spelt_out(node: Node) -> Node:
    """Vaswani et al. 2017, arXiv:1706.03762, equation 1."""
    defaults: list[Any] = [None, None, None, None, 0.0, False]
    given: list[Any] = [*node.args, *defaults[len(node.args) :]]
    query, key, value, mask, dropout, causal = given
    scale = node.kwargs.get("scale") or query.meta["val"].shape[-1] ** -0.5
    scores = emit(node, _aten.matmul.default, (query, emit(node, _aten.transpose.int, (key, -2, -1))))
    scores = emit(node, _aten.mul.Tensor, (scores, scale))
    if causal:
        mask = _causal(node, scores)
    closed, least = None, torch.finfo(scores.meta["val"].dtype).min
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        closed = emit(node, _aten.logical_not.default, (mask,))
        scores = emit(node, _aten.masked_fill.Scalar, (scores, closed, least))
    elif mask is not None:
        closed = emit(node, _aten.eq.Scalar, (mask, -torch.inf))
        scores = emit(node, _aten.add.Tensor, (scores, emit(node, _aten.clamp.default, (mask, least))))
    shares = emit(node, _aten.softmax.int, (scores, -1))
    if closed is not None:  # a query to which all is closed attends to nothing
        shares = emit(node, _aten.masked_fill.Scalar, (shares, closed, 0.0))
    if dropout:
        shares = emit(node, _aten.dropout.default, (shares, dropout, True))
    return emit(node, _aten.matmul.default, (shares, value))


def _sum(node: Node) -> Node:
    mask, *factors = node.args
    return emit(node, _aten.add.Tensor, (emit(node, _aten.bmm.default, factors), mask))


def _causal(node: Node, scores: Node) -> Node:
    """Return what says of each query which keys are not after it."""
    sizes = [
        size if isinstance(size, int) else emit(node, _aten.sym_size.int, (scores, dim))
        for dim, size in ((-2, scores.meta["val"].shape[-2]), (-1, scores.meta["val"].shape[-1]))
    ]
    ones = emit(node, _aten.new_ones.default, (scores, sizes), {"dtype": torch.bool})
    return emit(node, _aten.tril.default, (ones,))
