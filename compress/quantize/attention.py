"""Attention's two products in integers: the fused operator spelt out, so that what both multiply can be rounded.

Of queries, keys, values and probabilities each gets a range, as other activations do (Q-BERT, arXiv:1909.05840, and
I-BERT, arXiv:2101.01321, round them, too). Softmax, masks and the scale stay in floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from compress.quantize.annotate import layer_of
from compress.quantize.normalize import emit, parameters_alone, replace, tag
from compress.quantize.schemes import FLOAT, Scheme

__all__ = ["SPELT_OUT", "activation_products", "spell_out_attention"]

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
SPELT_OUT = (_aten.matmul.default, _aten.bmm.default)
"""Products whose factors can be rounded."""


def activation_products(graph_module: GraphModule) -> list[Node]:
    """Return the matrix products of two activations, attention in one operator included."""
    fixed = parameters_alone(graph_module)
    return [
        node
        for node in graph_module.graph.nodes
        if node.target is _ATTENTION
        or (node.target in SPELT_OUT and not any(factor in fixed for factor in node.args[:2]))
    ]


def spell_out_attention(graph_module: GraphModule, schemes: Mapping[str, Scheme]) -> None:
    """Write attention in one operator as two products with a softmax between, where a scheme rounds them, in place.

    Attention whose query heads share key heads stays as it is.

    Args:
        graph_module: Captured and normalised.
        schemes: Of each module.
    """
    changed = False
    for node in [node for node in graph_module.graph.nodes if node.target is _ATTENTION]:
        if schemes.get(layer_of(node), FLOAT).attention and not node.kwargs.get("enable_gqa", False):
            with graph_module.graph.inserting_before(node):
                replace(node, _spelt_out(node))
            changed = True
    if changed:
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
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        scores = emit(
            node, _aten.masked_fill.Scalar, (scores, emit(node, _aten.logical_not.default, (mask,)), -torch.inf)
        )
    elif mask is not None:
        scores = emit(node, _aten.add.Tensor, (scores, mask))
    shares = emit(node, _aten.softmax.int, (scores, -1))
    if dropout:
        shares = emit(node, _aten.dropout.default, (shares, dropout, True))
    return emit(node, _aten.matmul.default, (shares, value))


def _causal(node: Node, scores: Node) -> Node:
    """Return what says of each query which keys are not after it."""
    sizes = [
        size if isinstance(size, int) else emit(node, _aten.sym_size.int, (scores, dim))
        for dim, size in ((-2, scores.meta["val"].shape[-2]), (-1, scores.meta["val"].shape[-1]))
    ]
    device = scores.meta["val"].device
    ones = emit(node, _aten.ones.default, (sizes,), {"dtype": torch.bool, "device": device})
    return emit(node, _aten.tril.default, (ones,))
