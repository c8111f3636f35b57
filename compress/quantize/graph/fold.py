"""What conversion to integers is given: weights as stored tensors, and BatchNorms folded into their convolutions.

PT2E has both for itself, for weights that are parameters as they stand and for an eps of 1e-5; it searches for
BatchNorms with a hundred patterns, each of them exported anew, which takes most of the time of a conversion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from compress.quantize.graph.factors import factor_as_it_is
from compress.quantize.graph.normalize import constant_of, parameters_alone

__all__ = ["drop_unused", "fold_into_scales", "fold_norms", "hide_norms", "run_folded", "show_norms", "store_weights"]

_aten = torch.ops.aten
_LAYERS = {
    _aten.linear.default,
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.conv1d.padding,
    _aten.conv2d.padding,
    _aten.conv3d.padding,
    _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input,
    _aten.conv_transpose3d.input,
}


def fold_norms(graph_module: GraphModule) -> None:
    """Fold BatchNorms in evaluation into the convolutions that fake quantization has fused them with, in place.

    Such a convolution has a weight that is scaled before it is rounded, and its result is divided by that scale:
    ``norm(conv(x, round(w * s)) / s + b)`` is ``conv(x, round(w * s)) + (b - mean) * s + beta``.
    """
    for norm in [node for node in graph_module.graph.nodes if node.target is _aten.batch_norm.default]:
        found = _fused(norm)
        if found is None:
            continue
        convolution, bias = found
        fake: Any = convolution.args[1]
        scaled = fake.args[0]
        factor_as_it_is(scaled.args[1])
        _, gamma, beta, mean, var, _, _, eps, *_ = [
            constant_of(graph_module, value) for value in [None, *norm.args[1:]]
        ]
        scale = gamma / torch.sqrt(var + eps)
        inner = constant_of(graph_module, bias) if bias is not None else 0
        with graph_module.graph.inserting_before(scaled):
            weight = _stored(graph_module, scaled, constant_of(graph_module, scaled))
        fake.update_arg(0, weight)
        with graph_module.graph.inserting_before(convolution):
            folded = _stored(graph_module, norm, beta + (inner - mean) * scale)
        convolution.args = (*convolution.args[:2], folded, *convolution.args[3:])
        norm.replace_all_uses_with(convolution)
        graph_module.graph.erase_node(norm)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def run_folded(graph_module: GraphModule) -> None:
    """Let a graph in evaluation compute what ``fold_norms`` makes of it, of parameters that may still change, in place.

    So what is judged is what is deployed, to the last bit: a sum that differs in that is rounded to another integer
    once in a while.
    """
    graph = graph_module.graph
    for norm in [node for node in graph.nodes if node.target is _aten.batch_norm.default]:
        found = _fused(norm)
        if found is None or norm.args[5]:
            continue
        convolution, inner = found
        factor_as_it_is(convolution.args[1].args[0].args[1])  # type: ignore[union-attr, arg-type]
        with graph.inserting_before(convolution):
            # Copies of what reads parameters: the others may stand behind the convolution.
            gamma, beta, mean, var = map(graph.node_copy, norm.args[1:5])  # type: ignore[arg-type]
            spread = graph.call_function(_aten.sqrt.default, (_added(graph, var, norm.args[7]),))
            scale = graph.call_function(_aten.div.Tensor, (gamma, spread))
            if inner is None:
                centred = graph.call_function(_aten.neg.default, (mean,))
            else:
                centred = graph.call_function(_aten.sub.Tensor, (graph.node_copy(inner), mean))
            folded = _added(graph, beta, graph.call_function(_aten.mul.Tensor, (centred, scale)))
        convolution.args = (*convolution.args[:2], folded, *convolution.args[3:])
        norm.replace_all_uses_with(convolution)
        graph.erase_node(norm)
    graph.eliminate_dead_code()
    graph_module.recompile()


def fold_into_scales(graph_module: GraphModule) -> None:
    """Fold BatchNorms in evaluation into the scales of the integers that the layers in front multiply by, in place.

    ``norm(conv(x, s * q) + b)`` is ``conv(x, f * s * q) + (b - mean) * f + beta``, f the norm's scale. Where f is
    negative, integers change their sign; a norm stays where the least of them, which has no counterpart, would have to.
    """
    for norm in [node for node in graph_module.graph.nodes if node.target is _aten.batch_norm.default]:
        layer: Any = norm.args[0]
        _, gamma, beta, mean, var, training, _, eps, *_ = [
            constant_of(graph_module, given) for given in (None, *norm.args[1:])
        ]
        if training or mean is None or not _multiplies_integers(layer):
            continue
        integers, scale, zero, axis, low, *kind = layer.args[1].args
        q, s = constant_of(graph_module, integers), constant_of(graph_module, scale).double()
        bias = constant_of(graph_module, layer.args[2]) if len(layer.args) > 2 and layer.args[2] is not None else 0
        f = (1 if gamma is None else gamma.double()) / torch.sqrt(var.double() + eps)
        sign = f.sign().view([-1 if dim == axis else 1 for dim in range(q.dim())])
        if bool(((sign < 0) & (q == low)).any()):
            continue
        shift = (bias - mean.double()) * f + (0 if beta is None else beta)
        with graph_module.graph.inserting_before(layer):
            turned = _stored(graph_module, integers, (q * sign).to(q.dtype))
            folded = _stored(graph_module, scale, torch.where(f == 0, s, s * f.abs()).float())
            weight = graph_module.graph.call_function(
                torch.ops.quantized_decomposed.dequantize_per_channel.default,
                (turned, folded, zero, axis, low, *kind),
            )
            layer.args = (layer.args[0], weight, _stored(graph_module, norm, shift.float()), *layer.args[3:])
        norm.replace_all_uses_with(layer)
        graph_module.graph.erase_node(norm)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def store_weights(graph_module: GraphModule) -> None:
    """Compute what fake quantizers round where it follows from parameters by other operators, in place."""
    fixed = parameters_alone(graph_module)
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.args[0] not in fixed:
            continue
        source = node.args[0]
        if source.op != "get_attr":
            with graph_module.graph.inserting_before(node):
                node.update_arg(0, _stored(graph_module, source, constant_of(graph_module, source)))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def hide_norms(graph_module: GraphModule) -> None:
    """Keep what BatchNorms are left from PT2E's search, until ``show_norms``."""
    _rename(graph_module, _aten.batch_norm.default, _batch_norm)


def show_norms(graph_module: GraphModule) -> None:
    """Undo ``hide_norms``."""
    _rename(graph_module, _batch_norm, _aten.batch_norm.default)


def drop_unused(graph_module: GraphModule) -> None:
    """Delete tensors that no node reads, as float weights after conversion: they would be in every artefact."""
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for name in [name for name in graph_module.state_dict() if name not in used]:
        owner, _, leaf = name.rpartition(".")
        delattr(graph_module.get_submodule(owner), leaf)


def _rename(graph_module: GraphModule, old: Any, new: Any) -> None:
    for node in graph_module.graph.nodes:
        if node.target is old:
            node.target = new
    graph_module.recompile()


def _batch_norm(*args: Any) -> Tensor:
    return _aten.batch_norm.default(*args)


def _multiplies_integers(layer: Any) -> bool:
    """Say whether a layer's only reader could be folded into the scales of its weight, one for each channel."""
    if not isinstance(layer, Node) or len(layer.users) != 1 or layer.target not in _LAYERS:
        return False
    if layer.target is _aten.linear.default and layer.meta["val"].dim() != 2:
        return False  # the norm is over another dimension
    weight = layer.args[1]
    return isinstance(weight, Node) and "dequantize_per_channel" in str(weight.target)


def _fused(norm: Node) -> tuple[Node, Node | None] | None:
    """Return the convolution that a norm is fused with, and its bias if it has one."""
    before, bias = norm.args[0], None
    if isinstance(before, Node) and before.target is _aten.add.Tensor and isinstance(before.args[1], Node):
        shaped = before.args[1]
        bias = shaped.args[0] if shaped.args else None
        before = before.args[0]
    if not (isinstance(before, Node) and before.target is _aten.div.Tensor):
        return None
    convolution = before.args[0]
    if not isinstance(convolution, Node) or "conv" not in str(convolution.target) or len(before.users) != 1:
        return None
    fake = convolution.args[1]
    is_scaled = isinstance(fake, Node) and fake.op == "call_module" and fake.args[0].target is _aten.mul.Tensor  # type: ignore[union-attr]
    return (convolution, bias) if is_scaled and (bias is None or isinstance(bias, Node)) else None


def _added(graph: Graph, first: Any, second: Any) -> Node:
    return graph.call_function(_aten.add.Tensor, (first, second))


def _stored(graph_module: GraphModule, like: Node, value: Tensor) -> Node:
    name = f"{like.name}_stored"
    # A parameter, since PT2E replaces weights by parameters of the same name.
    graph_module.register_parameter(name, nn.Parameter(value.detach().contiguous(), requires_grad=False))
    node = graph_module.graph.get_attr(name)
    node.meta = dict(like.meta)
    return node
