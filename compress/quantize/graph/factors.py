"""The factors by which PT2E scales a convolution's weight before it is rounded, and divides what it gives.

They are those of the BatchNorm behind it, gamma over the spread. Norms whose gamma is zero are common: residual blocks
begin as nothing (Goyal et al. 2017, arXiv:1706.02677, section 5.1), and training for sparsity ends there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

__all__ = ["divide_weights", "factor_as_it_is", "factors_without_zeros", "scaled_convolutions"]

_aten = torch.ops.aten


def factors_without_zeros(graph_module: GraphModule) -> None:
    """Let factors of zero be one, in place: no weight is lost by them, and nothing is divided by zero.

    The norm gives what it gave, since its own gamma is untouched, and gamma gets its gradient.
    """
    for factor in {rows.args[0]: None for _, rows, _ in scaled_convolutions(graph_module)}:
        with graph_module.graph.inserting_after(factor):
            there = graph_module.graph.call_function(_aten.ne.Scalar, (factor, 0))
        with graph_module.graph.inserting_after(there):
            chosen = graph_module.graph.call_function(_aten.where.ScalarOther, (there, factor, 1.0))
        there.meta = chosen.meta = dict(factor.meta)
        factor.replace_all_uses_with(chosen, delete_user_cb=lambda user, own=(there, chosen): user not in own)
    graph_module.recompile()


def divide_weights(graph_module: GraphModule) -> None:
    """Divide weights, after they are rounded, in place of what their convolutions give.

    ``conv(x, w) / s`` is ``conv(x, w / s)``, and a weight is small: to write results once more, and in the backward
    pass three times, was a third of what fake quantization costs a MobileNet.
    """
    for convolution, rows, division in scaled_convolutions(graph_module):
        last, bias = _with_bias(division)
        with graph_module.graph.inserting_before(convolution):
            weight = graph_module.graph.call_function(_aten.div.Tensor, (convolution.args[1], rows))
        convolution.args = (convolution.args[0], weight, bias, *convolution.args[3:])
        last.replace_all_uses_with(convolution)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def factor_as_it_is(rows: Node) -> None:
    """Undo ``factors_without_zeros`` for one weight: what is deployed has its norm in it."""
    chosen: Any = rows.args[0]
    if chosen.target is _aten.where.ScalarOther:
        rows.update_arg(0, chosen.args[1])


def scaled_convolutions(graph_module: GraphModule) -> list[tuple[Any, Any, Any]]:
    """Return convolutions that PT2E has fused with their norms, the factors of the weight, and the division behind."""
    found: list[tuple[Any, Any, Any]] = []
    for division in graph_module.graph.nodes:
        if division.target is not _aten.div.Tensor or not all(isinstance(given, Node) for given in division.args):
            continue
        convolution, shaped = division.args
        rows = _rows(convolution)
        if rows is None or len(convolution.users) != 1 or shaped.target is not _aten.reshape.default:
            continue
        if shaped.args[0] is rows.args[0] and _is_factor(rows.args[0]):
            found.append((convolution, rows, division))
    return found


def _is_factor(node: Any) -> bool:
    """Say whether a node is a norm's gamma over its spread, with or without zeros."""
    if node.target is _aten.where.ScalarOther:
        node = node.args[1]
    if node.target is not _aten.div.Tensor:
        return False
    gamma, spread = node.args
    return bool(
        isinstance(gamma, Node)
        and gamma.op == "get_attr"
        and isinstance(spread, Node)
        and spread.target is _aten.sqrt.default
    )


def _rows(node: Node) -> Node | None:
    """Return what a convolution's weight is multiplied by, before it is rounded or not, if it is."""
    if node.op != "call_function" or "aten.conv" not in str(node.target):
        return None
    weight: Any = node.args[1]
    scaled = weight.args[0] if weight.op == "call_module" else weight
    if not isinstance(scaled, Node) or scaled.target is not _aten.mul.Tensor:
        return None
    rows = scaled.args[1]
    return rows if isinstance(rows, Node) and rows.target is _aten.reshape.default else None


def _with_bias(division: Node) -> tuple[Node, Node | None]:
    """Return what gives a convolution's result, divided and with the bias added, and the bias if it has one."""
    for user in division.users:
        shaped: Any = user.args[1] if user.target is _aten.add.Tensor else None
        if isinstance(shaped, Node) and shaped.target is _aten.reshape.default and len(division.users) == 1:
            bias: Any = shaped.args[0]
            if bias.op == "get_attr":
                return user, bias
    return division, None
