"""A captured graph in the few forms that quantizers know: small rewritings after which it computes the same numbers.

A quantizer finds a layer by the module or function it was written as, and knows convolutions of images and ``linear``
alone. Here a product with a parameter becomes ``linear`` however it was written, a convolution of series becomes one of
images with a height of one, padding is spelt out in numbers, and each operator is named after what it does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional as F

__all__ = [
    "REWRITINGS",
    "constant_of",
    "drop_neutral",
    "emit",
    "flatten_series",
    "normalize",
    "parameters_alone",
    "products_as_linear",
    "replace",
    "spell_out_padding",
    "tag",
]

_aten = torch.ops.aten

_PADDED = {
    _aten.conv1d.padding: _aten.conv1d.default,
    _aten.conv2d.padding: _aten.conv2d.default,
    _aten.conv3d.padding: _aten.conv3d.default,
}
_NEUTRAL = {_aten.add.Tensor: 0, _aten.add_.Tensor: 0, _aten.mul.Tensor: 1, _aten.mul_.Tensor: 1}
_ADDS = (_aten.add.Tensor, _aten.add_.Tensor)
_UNARY = {
    _aten.relu.default: F.relu,
    _aten.relu_.default: F.relu,
    _aten.hardtanh.default: nn.Hardtanh,
    _aten.hardtanh_.default: nn.Hardtanh,
    _aten.hardswish.default: nn.Hardswish,
    _aten.hardswish_.default: nn.Hardswish,
    _aten.silu.default: nn.SiLU,
    _aten.silu_.default: nn.SiLU,
    _aten.leaky_relu.default: nn.LeakyReLU,
    _aten.leaky_relu_.default: nn.LeakyReLU,
    _aten.tanh.default: nn.Tanh,
    _aten.gelu.default: nn.GELU,
}
_LAYERS = {_aten.linear.default: F.linear, _aten.conv2d.default: F.conv2d, _aten.conv1d.default: F.conv1d}
_POINTWISE = {*_UNARY, *_ADDS, _aten.batch_norm.default, _aten.dropout.default, _aten.dropout_.default}
_UNNAMED = "unnamed"


def normalize(graph_module: GraphModule) -> None:
    """Apply every rewriting of this file, in place.

    Args:
        graph_module: Captured, before a quantizer has seen it.
    """
    for rewrite in REWRITINGS:
        rewrite(graph_module)
        graph_module.graph.eliminate_dead_code()
    tag(graph_module)
    graph_module.recompile()


def spell_out_padding(graph_module: GraphModule) -> None:
    """Write ``padding="same"`` and ``"valid"`` in numbers; where the sides differ, as a padding before."""
    for node in list(graph_module.graph.nodes):
        if node.target not in _PADDED:
            continue
        given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), node.args))
        sizes = given["weight"].meta["val"].shape[2:]
        dilation = _each(given.get("dilation", 1), len(sizes))
        totals = [d * (k - 1) if given.get("padding") == "same" else 0 for d, k in zip(dilation, sizes)]
        x = given["input"]
        with graph_module.graph.inserting_before(node):
            if any(total % 2 for total in totals):
                sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
                x, totals = emit(node, _aten.constant_pad_nd.default, (x, sides, 0.0)), [0] * len(totals)
            rest = (_each(given.get("stride", 1), len(sizes)), [total // 2 for total in totals], dilation)
            arguments = (x, given["weight"], given.get("bias"), *rest, given.get("groups", 1))
            replace(node, emit(node, _PADDED[node.target], arguments))


def drop_neutral(graph_module: GraphModule) -> None:
    """Take out ``x + 0`` and ``x * 1``, as sums that start from nothing leave behind."""
    for node in list(graph_module.graph.nodes):
        neutral = _NEUTRAL.get(node.target)
        if neutral is None or isinstance(node.args[1], Node) or node.args[1] != neutral:
            continue
        source = node.args[0]
        if source.meta["val"].dtype == node.meta["val"].dtype:
            replace(node, source)


def products_as_linear(graph_module: GraphModule) -> None:
    """Write ``mm``, ``addmm``, ``matmul`` and ``einsum`` with a parameter as ``linear``."""
    fixed = parameters_alone(graph_module)
    for node in list(graph_module.graph.nodes):
        build = _PRODUCTS.get(node.target)
        if build is not None and not node.kwargs and node not in fixed:
            with graph_module.graph.inserting_before(node):
                made = build(node, fixed)
            if made is not None:
                replace(node, made)


def flatten_series(graph_module: GraphModule) -> None:
    """Write convolutions of series as convolutions of images with a height of one, and all between two of them."""
    wide: dict[Node, Node] = {}
    for node in list(graph_module.graph.nodes):
        with graph_module.graph.inserting_before(node):
            made = _as_image(node, wide)
            if made is None:
                continue
            narrow = emit(node, _aten.squeeze.dim, (made, 2))
        wide[narrow] = made
        replace(node, narrow)


def fuse_volumes(graph_module: GraphModule) -> None:
    """Scale the weights of convolutions of volumes by their BatchNorms, and divide what they give, as PT2E does.

    It does so for images alone. The weight that is rounded is then the one that will be deployed
    (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2).
    """
    for norm in list(graph_module.graph.nodes):
        if norm.target is not _aten.batch_norm.default or norm.args[1] is None or norm.args[4] is None:
            continue
        convolution = norm.args[0]
        if convolution.target is not _aten.conv3d.default or len(convolution.users) != 1:
            continue
        given: list[Any] = [*convolution.args, *[None] * (3 - len(convolution.args))]
        x, weight, bias, *rest = given
        gamma, var, eps = norm.args[1], norm.args[4], norm.args[7]
        with graph_module.graph.inserting_before(norm):
            spread = emit(norm, _aten.sqrt.default, (emit(norm, _aten.add.Tensor, (var, eps)),))
            factor = emit(norm, _aten.div.Tensor, (gamma, spread))
            rows = emit(norm, _aten.reshape.default, (factor, [-1, 1, 1, 1, 1]))
            scaled = emit(norm, _aten.mul.Tensor, (weight, rows))
            made = emit(convolution, _aten.conv3d.default, (x, scaled, None, *rest))
            channels = [1, -1, 1, 1, 1]
            made = emit(norm, _aten.div.Tensor, (made, emit(norm, _aten.reshape.default, (factor, channels))))
            if bias is not None:
                shaped = emit(norm, _aten.reshape.default, (bias, channels))
                made = emit(norm, _aten.add.Tensor, (made, shaped))
        norm.update_arg(0, made)


def tag(graph_module: GraphModule) -> None:
    """Name each operator after what it does, one by one, so that a quantizer finds it however it was written.

    Sums and activations get a name only where an integer kernel takes them in: behind a layer, and sums of two
    activations of one shape.
    """
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            node.meta["source_fn_stack"] = [(node.name, _name(node))]
        else:
            node.meta.pop("source_fn_stack", None)  # else parameters would be layers of their own


def constant_of(graph_module: GraphModule, node: Any) -> Tensor:
    """Compute a node that depends on stored tensors alone: a weight, BatchNorm folded in or not."""
    if not isinstance(node, Node):
        return node  # type: ignore[no-any-return]
    if node.op == "get_attr":
        owner, _, leaf = str(node.target).rpartition(".")
        value: Tensor = getattr(graph_module.get_submodule(owner), leaf).detach()
        return value
    assert callable(node.target)
    args = map_arg(node.args, lambda source: constant_of(graph_module, source))
    kwargs = map_arg(node.kwargs, lambda source: constant_of(graph_module, source))
    computed: Tensor = node.target(*args, **kwargs)
    return computed


def parameters_alone(graph_module: GraphModule) -> set[Node]:
    """Return the nodes whose values follow from parameters and buffers alone."""
    found: set[Node] = set()
    for node in graph_module.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (
            node.op == "call_function" and sources and all(source in found for source in sources)
        ):
            found.add(node)
    return found


REWRITINGS: tuple[Callable[[GraphModule], None], ...] = (
    spell_out_padding,
    drop_neutral,
    products_as_linear,
    flatten_series,
    fuse_volumes,
)


def _from_matmul(node: Node, fixed: set[Node]) -> Node | None:
    x, weight = node.args
    if weight not in fixed or weight.meta["val"].dim() != 2:  # type: ignore[union-attr]
        return None
    return emit(node, _aten.linear.default, (x, emit(node, _aten.t.default, (weight,))))


def _from_addmm(node: Node, fixed: set[Node]) -> Node | None:
    bias, x, weight = node.args
    if weight not in fixed or bias not in fixed:
        return None
    if bias.meta["val"].shape != weight.meta["val"].shape[1:]:  # type: ignore[union-attr]
        return None
    return emit(node, _aten.linear.default, (x, emit(node, _aten.t.default, (weight,)), bias))


def _from_einsum(node: Node, fixed: set[Node]) -> Node | None:
    """Rewrite a sum over one label, with one label of the weight in the result."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "." in equation or "->" not in equation or len(operands) != 2:  # type: ignore[arg-type]
        return None
    terms, result = equation.split("->")
    pairs = list(zip(terms.split(","), operands))  # type: ignore[arg-type]
    pairs.sort(key=lambda pair: pair[1] in fixed)
    (labels, x), (weights, weight) = pairs
    if x in fixed or weight not in fixed or len(weights) != 2 or len(set(labels)) != len(labels):
        return None
    summed = [label for label in weights if label in labels and label not in result]
    free = [label for label in weights if label in result and label not in labels]
    rest = [label for label in labels if label not in summed]
    if len(summed) != 1 or len(free) != 1 or sorted(result) != sorted([*rest, *free]):
        return None
    if labels[-1] != summed[0]:
        order = [*(labels.index(label) for label in rest), labels.index(summed[0])]
        x = emit(node, _aten.permute.default, (x, order))
    if weights[0] != free[0]:
        weight = emit(node, _aten.t.default, (weight,))
    made = emit(node, _aten.linear.default, (x, weight))
    order = [[*rest, *free].index(label) for label in result]
    return made if order == sorted(order) else emit(node, _aten.permute.default, (made, order))


_PRODUCTS: dict[Any, Callable[[Node, set[Node]], Node | None]] = {
    _aten.mm.default: _from_matmul,
    _aten.matmul.default: _from_matmul,
    _aten.addmm.default: _from_addmm,
    _aten.einsum.default: _from_einsum,
}


def _as_image(node: Node, wide: dict[Node, Node]) -> Node | None:
    """Return what computes a node with a height of one, where that is wanted."""
    if node.target is _aten.conv1d.default:
        given: list[Any] = [*node.args, *(None, 1, 0, 1, 1)[len(node.args) - 2 :]]
        x, weight, bias, stride, padding, dilation, groups = given
        if x.meta["val"].dim() != 3:
            return None
        x = wide[x] if x in wide else emit(node, _aten.unsqueeze.default, (x, 2))
        weight = emit(node, _aten.unsqueeze.default, (weight, 2))
        sizes = ([1, *_each(stride, 1)], [0, *_each(padding, 1)], [1, *_each(dilation, 1)])
        return emit(node, _aten.conv2d.default, (x, weight, bias, *sizes, groups))
    if node.target not in _POINTWISE:
        return None
    num = 2 if node.target in _ADDS else 1
    sources: list[Any] = list(node.args[:num])
    if not all(source in wide for source in sources):
        return None
    return emit(node, node.target, (*(wide[source] for source in sources), *node.args[num:]), node.kwargs)


def _name(node: Node) -> Any:
    if node.target in _LAYERS:
        return _LAYERS[node.target]
    before = node.args[0] if node.args else None
    if not isinstance(before, Node):
        return _UNNAMED
    if node.target is _aten.batch_norm.default:
        return F.batch_norm if before.target in _LAYERS else _UNNAMED
    if node.target in _UNARY:
        return _UNARY[node.target] if before.target in _FUSED else _UNNAMED
    if node.target in _ADDS and not node.kwargs and _are_alike(*node.args):
        return operator.add if any(source.target in _FUSED for source in node.all_input_nodes) else _UNNAMED
    return _UNNAMED


_FUSED = {*_LAYERS, *_ADDS, _aten.batch_norm.default}


def _are_alike(first: Any, second: Any) -> bool:
    if not (isinstance(first, Node) and isinstance(second, Node)) or first is second:
        return False
    shapes = [[str(size) for size in node.meta["val"].shape] for node in (first, second)]
    return shapes[0] == shapes[1]


def _each(value: Any, num: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) else [value]
    return values * num if len(values) == 1 else values


def emit(like: Node, target: Any, args: Sequence[Any], kwargs: Any = None) -> Node:
    """Add a node that stands for a part of another one, and note what its value looks like."""
    node = like.graph.call_function(target, tuple(args), dict(kwargs or {}))
    node.meta = {key: value for key, value in like.meta.items() if key != "tensor_meta"}
    values = torch.fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    mode = like.meta["val"].fake_mode
    # What is looked at on the way must not become a condition on the batch size.
    with mode, mode.shape_env.suppress_guards() if mode.shape_env else nullcontext(), torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])
    return node


def replace(old: Node, new: Node) -> None:
    """Let another node stand for one, which goes."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
