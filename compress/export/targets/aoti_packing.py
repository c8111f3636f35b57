"""Weights of convolutions laid out at compilation, also where the batch may vary.

Inductor lays a convolution's weights out as oneDNN wants them once, when it knows the sizes of its input. Of a batch
that may vary it does not take the example: float weights stay as they are, and int8 weights get the layout for some
usual image. Where oneDNN takes another one for the real image, it lays them out anew **in every call**. The example's
sizes are nearly always right, since the layout hardly depends on the batch; where they are not, the numbers still are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import has_free_symbols

__all__ = ["register_packing"]

_AFTER_INDUCTORS = 2  # Inductor and torchao replace convolutions in passes 0 and 1
_FLOAT_ARGUMENTS = 10
_INT8_ARGUMENTS = 9


@cache
def register_packing() -> None:
    """Have Inductor lay out weights for the example's sizes, in all that it freezes in this process from now on."""
    if not torch.backends.mkldnn.is_available():
        return
    from torch._inductor.fx_passes.freezing_patterns import register_freezing_graph_pattern
    from torch._inductor.pattern_matcher import Arg, CallFunction, Match

    def arguments(number: int) -> list[Arg]:
        return [Arg() for _ in range(number)]

    convolution = CallFunction(torch.ops.mkldnn._convolution_pointwise.default, *arguments(_FLOAT_ARGUMENTS))

    @register_freezing_graph_pattern(convolution, extra_check=_has_plain_weight, pass_number=_AFTER_INDUCTORS)
    def lay_out_floats(match: Match, *_: Any) -> None:
        node = match.output_node()
        x, weight, _, *settings = _arguments(node)[:7]
        with match.graph.inserting_before(node):
            packed = match.graph.call_function(
                torch.ops.mkldnn._reorder_convolution_weight, (weight, *settings, _example_shape(x))
            )
        node.update_arg(1, packed)

    layout = CallFunction(torch.ops.onednn.qconv_prepack, *arguments(_INT8_ARGUMENTS), _users=1)

    @register_freezing_graph_pattern(layout, extra_check=_has_unknown_input, pass_number=_AFTER_INDUCTORS)
    def lay_out_integers(match: Match, *_: Any) -> None:
        node = match.output_node()
        node.args = (*_arguments(node)[:-1], _example_shape(_input_of(node)))


def _has_plain_weight(match: Any) -> bool:
    """Whether nobody has laid the weight out, and no other convolution, perhaps of another size, reads it.

    Images of one channel or one point lie in both orders of dimensions at once. Inductor takes them for channels last,
    and that the kernel does so, too, is known to it from plain weights alone; else its output is in the other order.
    """
    node = match.output_node()
    x, weight, *_ = _arguments(node)
    if weight.op != "get_attr" or len(weight.users) > 1:
        return False
    shape, outputs = _example_shape(x), _example_shape(node)
    return shape is not None and outputs is not None and (_has_one_order(shape) or not _has_one_order(outputs))


def _has_unknown_input(match: Any) -> bool:
    node = match.output_node()
    weight, *_, shape = _arguments(node)
    return shape is None and len(weight.users) == 1 and _example_shape(_input_of(node)) is not None


def _has_one_order(shape: Sequence[int]) -> bool:
    return shape[1] > 1 and max(shape[2:]) > 1


def _arguments(node: Node) -> list[Any]:
    return list(node.args)


def _input_of(packed: Node) -> Any:
    (convolution,) = packed.users
    return _arguments(convolution)[0]


def _example_shape(x: Any) -> Sequence[int] | None:
    """The example's, where the batch alone may vary: layouts depend on the rest."""
    value = x.meta.get("val")
    if value is None or has_free_symbols(value.shape[1:]):
        return None
    hint = getattr(symbolic_shapes, "optimization_hint", None) or getattr(symbolic_shapes, "hint_int")  # noqa: B009
    return [hint(size) for size in value.shape]  # torch 2.11 has the second
