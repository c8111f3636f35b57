"""Rewriting a quantised program so that XNNPACK computes its products in integers.

XNNPACK's integers are signed, and it multiplies them only where it is told which integers come out: PT2E leaves that
open for what oneDNN can fuse in floating point, as the branch of a residual sum that a convolution feeds, and for what
goes on in floats. Each function here mends one such place in a graph module, in place, and returns how many.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from compress.export.passes.nodes import add_constant, argument, constant, replace

__all__ = [
    "clip_few_bits",
    "float_weights",
    "quantize_branches",
    "quantize_inputs",
    "revive_channels",
    "rewrite",
    "sign_activations",
    "split_dequantizers",
    "widen_weights",
]

_ATEN = torch.ops.aten
_CONVOLUTIONS = {_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv1d.padding, _ATEN.conv2d.padding}
_PRODUCTS = _CONVOLUTIONS | {_ATEN.linear.default}
_FUSED = {_ATEN.relu.default, _ATEN.hardtanh.default}
# Where each keeps its bounds, or what they are.
_CLIPPING: dict[Any, tuple[str | float, str | float]] = {
    _ATEN.relu.default: (0.0, math.inf),
    _ATEN.clamp.default: ("min", "max"),
    _ATEN.hardtanh.default: ("min_val", "max_val"),
}
_SIGNED = (-128, 127)
_EPSILON = 1.1920928955078125e-07  # XNNPACK has its own


def rewrite(graph_module: GraphModule) -> int:
    """Apply every rewriting of this file.

    Args:
        graph_module: Of an exported program without in-place operators; changed in place.

    Returns:
        How many places were changed.
    """
    changed = split_dequantizers(graph_module)
    changed += sign_activations(graph_module)
    changed += clip_few_bits(graph_module)
    changed += revive_channels(graph_module)
    changed += widen_weights(graph_module)
    changed += quantize_branches(graph_module)
    changed += quantize_inputs(graph_module)
    changed += float_weights(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return changed


def split_dequantizers(graph_module: GraphModule) -> int:
    """Give each reader of dequantised values a node of its own: a shared one belongs to no kernel."""
    changed = 0
    for node in _nodes(graph_module):
        if _is(node, "dequantize_per_tensor") or _is(node, "dequantize_per_channel"):
            for user in list(node.users)[1:]:
                with graph_module.graph.inserting_after(node):
                    copy = graph_module.graph.node_copy(node)
                user.replace_input_with(node, copy)
                changed += 1
    return changed


def sign_activations(graph_module: GraphModule) -> int:
    """Write uint8 as int8: integers and zero points are shifted alike, so the numbers they stand for stay the same.

    The shift is the zero point where that fits, as for activations from 0 to 254 with zero at 127, and 128 otherwise.
    XNNPACK then clips to the numbers of int8, here one step further out than the program does.
    """
    changed = 0
    for node in _nodes(graph_module):
        if not (_is(node, "quantize_per_tensor") or _is(node, "dequantize_per_tensor")):
            continue
        values, scale, zero_point, low, high, dtype = node.args[:6]
        if dtype is torch.uint8:
            shift = min(max(zero_point, high - _SIGNED[1]), low - _SIGNED[0])
            node.args = (values, scale, zero_point - shift, low - shift, high - shift, torch.int8)
            changed += _is(node, "quantize_per_tensor")
    return changed


def clip_few_bits(graph_module: GraphModule) -> int:
    """Clip what is quantised to fewer numbers than int8 has, where XNNPACK would go on to the last of those.

    Clipping that is there already becomes part of it: XNNPACK's kernels clip once on their way out.
    """
    changed = 0
    for node in _nodes(graph_module):
        if not _is(node, "quantize_per_tensor") or node.args[4] - node.args[3] >= _SIGNED[1] - _SIGNED[0] - 1:
            continue
        value, (low, high) = node.args[0], _range(node)
        while value.target in _CLIPPING and len(value.users) == 1:
            bounds = _CLIPPING[value.target]
            limits = [bound if isinstance(bound, float) else argument(value, bound) for bound in bounds]
            low = low if limits[0] is None else max(low, limits[0])
            high = high if limits[1] is None else min(high, limits[1])
            value = value.args[0]
        with graph_module.graph.inserting_before(node):
            clipped = graph_module.graph.call_function(_ATEN.hardtanh.default, (value, low, high))
        node.update_arg(0, clipped)
        changed += 1
    graph_module.graph.eliminate_dead_code()
    return changed


def revive_channels(graph_module: GraphModule) -> int:
    """Write channels whose weights are all zero as zeros with zero at 0 and the largest scale of their layer.

    XNNPACK takes zero for granted where weights are concerned, and counts biases in a channel's scale.
    """
    changed = 0
    for node in _nodes(graph_module):
        if not _is(node, "dequantize_per_channel") or node.args[3] != 0:
            continue
        integers, scales, zero_points = (constant(graph_module, value) for value in node.args[:3])
        if integers is None or scales is None or zero_points is None:
            continue
        dead = (integers.flatten(1) == zero_points[:, None]).all(1)
        if not dead.any():
            continue
        largest = scales[~dead].max() if not dead.all() else torch.ones(())
        wide = dead.view(-1, *[1] * (integers.dim() - 1))
        for index, value in enumerate(
            (integers.masked_fill(wide, 0), torch.where(dead, largest, scales), zero_points.masked_fill(dead, 0))
        ):
            node.update_arg(index, add_constant(graph_module, value, node, "revived"))
        changed += 1
    return changed


def widen_weights(graph_module: GraphModule) -> int:
    """Let weights of few bits be int8, as which they are stored: of 4 bits XNNPACK knows no convolutions."""
    changed = 0
    for node in _nodes(graph_module):
        if _is(node, "dequantize_per_channel") and node.args[6] is torch.int8 and node.args[4:6] != _SIGNED:
            node.args = (*node.args[:4], *_SIGNED, *node.args[6:])
            changed += 1
    return changed


def quantize_branches(graph_module: GraphModule) -> int:
    """Quantise what a convolution or matrix product adds to an already quantised value.

    The sum ``z = y + s`` is quantised, so it is clipped to a known range, as ``s`` is; hence no value of ``y``
    outside ``[min z - max s, max z - min s]`` makes a difference, and that range loses nothing by clipping.
    """
    changed = 0
    for add in _nodes(graph_module):
        if add.target is not _ATEN.add.Tensor or add.kwargs.get("alpha", 1) != 1:
            continue
        quantizer = _quantizer(add)
        for branch, other in (add.args[:2], add.args[1::-1]):
            if quantizer is None or not _is(other, "dequantize_per_tensor") or not _is_open(branch):
                continue
            (low, high), (least, largest) = _range(quantizer), _range(other)
            _quantize(graph_module, branch, add, low - largest, high - least)
            changed += 1
            break
    return changed


def quantize_inputs(graph_module: GraphModule) -> int:
    """Let products whose results go on in floats quantise their input again, by its own range as it comes.

    XNNPACK has kernels from such integers to floats. Their steps are no wider than those that the input already has;
    each row of a matrix, or sample of a convolution, has its own.
    """
    changed = 0
    for node in _nodes(graph_module):
        if _is_open(node) and _has_dynamic_kernel(graph_module, node):
            _quantize_as_it_comes(graph_module, node)
            changed += 1
    return changed


def float_weights(graph_module: GraphModule) -> int:
    """Write the weights of products that XNNPACK has no kernel of integers for as floats."""
    changed = 0
    for node in _nodes(graph_module):
        if not _is(node, "dequantize_per_channel"):
            continue
        if _has_kernel(graph_module, node, next(iter(node.users))):
            continue
        values = [constant(graph_module, value) if isinstance(value, Node) else value for value in node.args]
        weight = torch.ops.quantized_decomposed.dequantize_per_channel.default(*values)
        replace(node, add_constant(graph_module, weight, node, "floats"))
        changed += 1
    return changed


def _is_open(node: Any) -> bool:
    """Say whether a node is a product of integers whose result is not quantised."""
    return (
        isinstance(node, Node)
        and node.target in _PRODUCTS
        and _is(node.args[0], "dequantize_per_tensor")
        and _is(node.args[1], "dequantize_per_channel")
        and _quantizer(node) is None
    )


def _quantizer(node: Any) -> Node | None:
    """Return what alone reads a node's result, behind an activation that kernels take along, and quantises it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _FUSED:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and _is(users[0], "quantize_per_tensor") else None


def _has_kernel(graph_module: GraphModule, weight: Any, product: Any) -> bool:
    zero_points = constant(graph_module, weight.args[2])
    return (
        product.target in _PRODUCTS
        and product.args[1] is weight
        and _is_any(product.args[0], "dequantize_per_tensor")
        and not _is_open(product)
        and zero_points is not None
        and not zero_points.any()
    )


def _has_dynamic_kernel(graph_module: GraphModule, node: Any) -> bool:
    if node.target is _ATEN.linear.default:
        return True
    weight = constant(graph_module, node.args[1].args[0])
    return weight is not None and weight.dim() == 4 and (weight.shape[1] > 1 or argument(node, "groups") == 1)


def _range(node: Any) -> tuple[float, float]:
    scale, zero_point, low, high = node.args[1:5]
    return (low - zero_point) * scale, (high - zero_point) * scale


def _quantize(graph_module: GraphModule, value: Node, user: Node, low: float, high: float) -> None:
    least, largest = _SIGNED
    scale = (high - low) / (largest - least)
    zero_point = min(max(round(least - low / scale), least), largest)
    settings = (scale, zero_point, least, largest, torch.int8)
    operators = torch.ops.quantized_decomposed
    with graph_module.graph.inserting_before(user):
        integers = graph_module.graph.call_function(operators.quantize_per_tensor.default, (value, *settings))
        again = graph_module.graph.call_function(operators.dequantize_per_tensor.default, (integers, *settings))
    user.replace_input_with(value, again)


def _quantize_as_it_comes(graph_module: GraphModule, node: Node) -> None:
    operators, (least, largest) = torch.ops.quantized_decomposed, _SIGNED
    value = node.args[0]
    call = graph_module.graph.call_function
    with graph_module.graph.inserting_before(node):
        found = call(operators.choose_qparams.tensor, (value, least, largest, _EPSILON, torch.int8))
        settings: tuple[Any, ...] = (call(operator.getitem, (found, 0)), call(operator.getitem, (found, 1)))
        settings += (least, largest, torch.int8)
        integers = call(operators.quantize_per_tensor.tensor, (value, *settings))
        again = call(operators.dequantize_per_tensor.tensor, (integers, *settings))
    node.update_arg(0, again)


def _nodes(graph_module: GraphModule) -> list[Any]:
    return list(graph_module.graph.nodes)


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Node) and str(value.target) == f"quantized_decomposed.{name}.default"


def _is_any(value: Any, name: str) -> bool:
    return isinstance(value, Node) and str(value.target).startswith(f"quantized_decomposed.{name}.")
