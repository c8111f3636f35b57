"""What the matrix products of an exported program cost, and which of them are quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node, map_arg
from torch.utils.flop_counter import FlopCounterMode

from compress.surgery.lengths import user_inputs

__all__ = ["RECURRENT", "Product", "int8_macs", "products"]

_OPERATORS = torch.ops.aten
_CONVOLUTIONS = {
    _OPERATORS.conv1d.default,
    _OPERATORS.conv2d.default,
    _OPERATORS.conv3d.default,
    _OPERATORS.conv1d.padding,
    _OPERATORS.conv2d.padding,
    _OPERATORS.conv3d.padding,
    _OPERATORS.convolution.default,
}
_TRANSPOSED = {
    _OPERATORS.conv_transpose1d.default,
    _OPERATORS.conv_transpose2d.input,
    _OPERATORS.conv_transpose3d.input,
}
_MATRICES = {_OPERATORS.matmul.default, _OPERATORS.mm.default, _OPERATORS.bmm.default, _OPERATORS.mv.default}
_SUMMED = {_OPERATORS.addmm.default, _OPERATORS.baddbmm.default, _OPERATORS.addmv.default}
# Made of other products, which their arguments tell.
_COMPOSED = {_OPERATORS.einsum.default, _OPERATORS.tensordot.default, _OPERATORS.inner.default}
RECURRENT = {_OPERATORS.lstm.input, _OPERATORS.gru.input, _OPERATORS.rnn_tanh.input, _OPERATORS.rnn_relu.input}
# Values pass through these unchanged, only to other places.
_VIEWS: tuple[str, ...] = (
    "view",
    "reshape",
    "permute",
    "transpose",
    "t.",
    "flatten",
    "unflatten",
    "expand",
    "squeeze",
    "unsqueeze",
)
_VIEWS += ("clone", "contiguous", "slice", "select", "unbind", "chunk", "split", "getitem", "alias", "detach")
# Gives the sizes of a node's value.
_Sizes = Callable[[Any], tuple[int, ...]]


@dataclass(frozen=True)
class Product:
    """A convolution, a matrix product, as ``einsum`` makes them, too, attention's two products, or a recurrent layer.

    Args:
        name: Of its node.
        macs: Multiply-accumulates for one sample, of typical sizes where these vary.
        quantized: Whether all that it multiplies comes from integers.
        of_activations: Whether it is a product of two activations, as in attention, where it is quantised.
    """

    name: str
    macs: int
    quantized: bool
    of_activations: bool = False


def products(program: ExportedProgram) -> list[Product]:
    """List a program's products in the order of the graph.

    Args:
        program: Captured with a dynamic batch dimension. Sizes that depend on it count for one sample; where others
            vary, for a sample of the sizes of its example inputs.
    """
    sizes = _sizes_of_one_sample(program)
    found = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            macs = _macs(node, sizes)
            if macs:
                quantized = all(_from_integers(factor) for factor in _factors(node))
                # Quantised products with weights are linear, however they were written.
                found.append(Product(node.name, macs, quantized, quantized and node.target in _MATRICES | _COMPOSED))
    return found


def int8_macs(found: Iterable[Product], *, int8_kernels: int, float_kernels: int) -> int:
    """Return how many multiply-accumulates an engine is certain to compute in integers.

    An engine does not say which product a kernel stems from. A quantised product that it computes in floats is missing
    among its integer kernels and is one too many among its float kernels, so at most the smaller of these two numbers
    has fallen back; the largest products are taken to be the ones. Integer products that the engine merges, and
    attention that it takes apart, cost nothing that way.

    Args:
        found: The program's products.
        int8_kernels: Of the compiled graph.
        float_kernels: Of the compiled graph.

    Example:
        >>> found = [Product("a", 10, True), Product("b", 30, True), Product("c", 5, False)]
        >>> int8_macs(found, int8_kernels=2, float_kernels=1)
        40
        >>> int8_macs(found, int8_kernels=1, float_kernels=2)
        10
    """
    found = list(found)
    quantized = sorted(product.macs for product in found if product.quantized)
    if not int8_kernels:
        return 0
    missing = max(0, len(quantized) - int8_kernels)
    surplus = max(0, float_kernels - (len(found) - len(quantized)))
    return sum(quantized[: len(quantized) - min(missing, surplus)])


def _macs(node: Node, sizes: _Sizes) -> int:
    target: Any = node.target
    if target in RECURRENT:
        return _recurrent_macs(node, sizes)
    if target is _OPERATORS.scaled_dot_product_attention.default:
        query, key, value = (sizes(factor) for factor in node.args[:3])
        return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if target in _TRANSPOSED:
        return prod(sizes(node.args[0])) * prod(sizes(node.args[1])[1:])
    if target in _CONVOLUTIONS or target is _OPERATORS.linear.default:
        return prod(sizes(node)) * prod(sizes(node.args[1])[1:])
    if target in _MATRICES | _SUMMED:
        return prod(sizes(node)) * sizes(_factors(node)[0])[-1]
    if target is _OPERATORS.bilinear.default:
        return prod(sizes(node)[:-1]) * prod(sizes(node.args[2]))
    return _composed_macs(node, sizes) if target in _COMPOSED else 0


def _composed_macs(node: Node, sizes: _Sizes) -> int:
    """Count by running the operator on tensors without values."""
    args = map_arg(node.args, lambda value: torch.empty(sizes(value), device="meta"))
    with FlopCounterMode(display=False) as counter:
        node.target(*args, **node.kwargs)  # type: ignore[operator]
    return counter.get_total_flops() // 2


def _recurrent_macs(node: Node, sizes: _Sizes) -> int:
    steps = prod(sizes(node.args[0])[:-1])
    return steps * sum(prod(sizes(weight)) for weight in _recurrent_weights(node))


def _recurrent_weights(node: Node) -> list[Any]:
    parameters: Any = node.args[2]
    return [value for value in parameters if value.meta["val"].dim() == 2]


def _factors(node: Node) -> list[Any]:
    if node.target in RECURRENT:  # what they are multiplied with becomes integers at run time
        return _recurrent_weights(node)
    if node.target in _SUMMED:
        return list(node.args[1:3])
    if node.target in (_OPERATORS.scaled_dot_product_attention.default, _OPERATORS.bilinear.default):
        return list(node.args[:3])
    if node.target is _OPERATORS.einsum.default:
        return list(node.args[1])  # type: ignore[arg-type]
    return list(node.args[:2])


def _sizes_of_one_sample(program: ExportedProgram) -> _Sizes:
    examples, _ = program.example_inputs
    known: dict[Any, int] = {}
    for index, (_, value) in enumerate(user_inputs(program)):
        for dimension, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                known[size.node.expr] = examples[index].shape[dimension] if dimension else 1

    def number(size: Any) -> int:
        return int(size.node.expr.subs(known)) if isinstance(size, torch.SymInt) else size

    return lambda value: tuple(map(number, value.meta["val"].shape))


def _from_integers(value: Any) -> bool:
    while isinstance(value, Node):
        name = str(value.target)
        if "dequantize" in name:
            return True
        if not name.removeprefix("aten.").startswith(_VIEWS) and "getitem" not in name:
            return False
        value = value.args[0]
    return False
