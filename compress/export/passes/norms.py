"""BatchNorms in evaluation, which are a scale and a shift, folded into the layer in front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from compress.export.passes.nodes import add_constant, argument, constant, replace

__all__ = ["fold_norms"]

_ATEN = torch.ops.aten
_NORM = _ATEN._native_batch_norm_legit_no_training.default  # what a BatchNorm in evaluation becomes
_CONVOLUTIONS = {_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default}
_PADDED = {_ATEN.conv1d.padding, _ATEN.conv2d.padding, _ATEN.conv3d.padding}
_TRANSPOSED = {_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input}


def fold_norms(graph_module: GraphModule) -> int:
    """Fold BatchNorms into the convolutions and linear layers whose only readers they are; return how many."""
    changed = 0
    for norm in list(graph_module.graph.nodes):
        if norm.target is not _NORM or not _takes_a_norm(norm.args[0]):
            continue
        layer = norm.args[0]
        weight, bias, scale, shift, mean, variance = (
            constant(graph_module, given) for given in (*_parameters(layer), *norm.args[1:5])
        )
        optional = zip((bias, scale, shift), (_parameters(layer)[1], *norm.args[1:3]))
        if weight is None or mean is None or variance is None or any((a is None) != (b is None) for a, b in optional):
            continue  # made by other operators, as of quantised layers
        fused = _fuse(layer, weight, bias, scale, shift, mean, variance, norm.args[6])
        for position, value, name in zip((1, 2), fused, ("weight", "bias")):
            node = add_constant(graph_module, value.to(weight.dtype), layer, f"folded_{name}")
            layer.args = (*layer.args[:position], node, *layer.args[position + 1 :])
        for result in list(norm.users):  # the first of three, the other two are empty
            replace(result, layer)
        changed += 1
    graph_module.graph.eliminate_dead_code()
    return changed


def _takes_a_norm(layer: Any) -> bool:
    if not isinstance(layer, Node) or len(layer.users) != 1:
        return False
    if layer.target is _ATEN.linear.default:
        value = layer.meta.get("val")
        return isinstance(value, Tensor) and value.dim() == 2  # else the norm is over another dimension
    if layer.target in _TRANSPOSED:  # groups lie along their outputs in another way
        return bool(argument(layer, "groups") == 1)
    return layer.target in _CONVOLUTIONS | _PADDED


def _parameters(layer: Node) -> tuple[Any, Any]:
    return layer.args[1], layer.args[2] if len(layer.args) > 2 else None


def _fuse(
    layer: Node,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return weight and bias in float64, so that folding rounds once."""
    w, m, v = weight.double(), mean.double(), variance.double()
    b = torch.zeros_like(m) if bias is None else bias.double()
    gamma = torch.ones_like(m) if scale is None else scale.double()
    beta = torch.zeros_like(m) if shift is None else shift.double()
    if layer.target is _ATEN.linear.default:
        return fuse_linear_bn_weights(w, b, m, v, eps, gamma, beta)
    return fuse_conv_bn_weights(w, b, m, v, eps, gamma, beta, transpose=layer.target in _TRANSPOSED)
