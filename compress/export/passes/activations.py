"""Activation functions written out as arithmetic, as one operator each: engines have kernels for these."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node, symbolic_trace

from compress.export.passes.nodes import argument, replace

__all__ = ["fuse_activations"]

_ATEN = torch.ops.aten
_SYMMETRIC = {_ATEN.add.Tensor, _ATEN.mul.Tensor}
Formula = Callable[[Any], Any]


def fuse_activations(graph_module: GraphModule) -> int:
    """Write SiLU, Mish, hard swish, hard sigmoid and both GELUs as one operator each; return how many places."""
    changed = 0
    for node in reversed(list(graph_module.graph.nodes)):
        for formula, operator, options in _FUSIONS:
            found = _match(_pattern(formula), node, {}) if node.op == "call_function" and node.users else None
            if found is not None and not _is_read_inside(node, found):
                _rewrite(
                    graph_module, node, next(found[key] for key in found if key.op == "placeholder"), operator, options
                )
                changed += 1
                break
    graph_module.graph.eliminate_dead_code()
    return changed


def _rewrite(graph_module: GraphModule, node: Node, x: Node, operator: Any, options: dict[str, Any]) -> None:
    with graph_module.graph.inserting_before(node):
        fused = graph_module.graph.call_function(operator, (x,), options)
    fused.meta["val"] = node.meta.get("val")
    replace(node, fused)


@cache
def _pattern(formula: Formula) -> Node:
    """Return the last operator of a formula's graph."""
    output = next(iter(reversed(symbolic_trace(formula).graph.nodes)))
    last = output.args[0]
    assert isinstance(last, Node)
    return last


def _match(wanted: Node, found: Any, so_far: dict[Node, Node]) -> dict[Node, Node] | None:
    """Return which nodes stand for those of a formula, or ``None`` where a place is not written so."""
    if wanted in so_far:
        return so_far if so_far[wanted] is found else None
    if not isinstance(found, Node):
        return None
    if wanted.op == "placeholder":
        return {**so_far, wanted: found}
    if found.target is not wanted.target:
        return None
    target: Any = wanted.target
    names = [own.name for own in target._schema.arguments]
    pairs = [(argument(wanted, name), argument(found, name)) for name in names]
    swapped = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1]), *pairs[2:]] if target in _SYMMETRIC else pairs
    for order in (pairs, swapped):
        matched = _match_all(order, {**so_far, wanted: found})
        if matched is not None:
            return matched
    return None


def _match_all(pairs: list[tuple[Any, Any]], so_far: dict[Node, Node]) -> dict[Node, Node] | None:
    for wanted, found in pairs:
        if isinstance(wanted, Node):
            matched = _match(wanted, found, so_far)
            if matched is None:
                return None
            so_far = matched
        elif not _is_same_number(wanted, found):
            return None
    return so_far


def _is_same_number(wanted: Any, found: Any) -> bool:
    """Compare as people write them: integers or floats, constants with five digits or more."""
    if isinstance(wanted, int | float) and isinstance(found, int | float):
        return math.isclose(wanted, found, rel_tol=1e-5)
    return bool(wanted == found)


def _is_read_inside(last: Node, found: dict[Node, Node]) -> bool:
    """Say whether someone else needs a value in between, which must then be computed anyway."""
    inner = {node for wanted, node in found.items() if wanted.op != "placeholder"}
    return any(user not in inner for node in inner - {last} for user in node.users)


def _half(x: Any) -> Any:
    return _ATEN.mul.Tensor(x, 0.5)


def _sixth(x: Any) -> Any:
    return _ATEN.div.Tensor(x, 6)


def _erf(x: Any) -> Any:
    return _ATEN.erf.default(_ATEN.div.Tensor(x, math.sqrt(2)))


def _erf_of_product(x: Any) -> Any:
    return _ATEN.erf.default(_ATEN.mul.Tensor(x, math.sqrt(0.5)))


def _tanh(x: Any) -> Any:
    cubed = _ATEN.mul.Tensor(_ATEN.pow.Tensor_Scalar(x, 3.0), 0.044715)
    return _ATEN.tanh.default(_ATEN.mul.Tensor(_ATEN.add.Tensor(x, cubed), math.sqrt(2 / math.pi)))


def _gelus(inner: Formula) -> list[Formula]:
    """Return the ways to write x / 2 * (1 + inner(x)), orders of factors aside."""

    def outer(x: Any) -> Any:
        return _ATEN.add.Tensor(inner(x), 1)

    return [
        lambda x: _ATEN.mul.Tensor(_half(x), outer(x)),
        lambda x: _ATEN.mul.Tensor(x, _half(outer(x))),
        lambda x: _half(_ATEN.mul.Tensor(x, outer(x))),
    ]


def _hard_swishes(clip: Formula) -> list[Formula]:
    return [lambda x: _ATEN.mul.Tensor(x, _sixth(clip(x))), lambda x: _sixth(_ATEN.mul.Tensor(x, clip(x)))]


def _hard_sigmoid(clip: Formula) -> Formula:
    return lambda x: _sixth(clip(x))


def _shifted(x: Any) -> Any:
    return _ATEN.add.Tensor(x, 3)


# The ways to clip x + 3 between zero and six.
_CLIPS: list[Formula] = [
    lambda x: _ATEN.relu6.default(_shifted(x)),
    lambda x: _ATEN.hardtanh.default(_shifted(x), 0, 6),
    lambda x: _ATEN.clamp.default(_shifted(x), 0, 6),
]

# A formula, the operator that it is, and the operator's options; longer formulas before those that they hold.
_FUSIONS: list[tuple[Formula, Any, dict[str, Any]]] = [
    (lambda x: _ATEN.mul.Tensor(x, _ATEN.sigmoid.default(x)), _ATEN.silu.default, {}),
    (lambda x: _ATEN.mul.Tensor(x, _ATEN.tanh.default(_ATEN.softplus.default(x))), _ATEN.mish.default, {}),
    *((formula, _ATEN.gelu.default, {}) for inner in (_erf, _erf_of_product) for formula in _gelus(inner)),
    *((formula, _ATEN.gelu.default, {"approximate": "tanh"}) for formula in _gelus(_tanh)),
    *((formula, _ATEN.hardswish.default, {}) for clip in _CLIPS for formula in _hard_swishes(clip)),
    *((_hard_sigmoid(clip), _ATEN.hardsigmoid.default, {}) for clip in _CLIPS),
]
