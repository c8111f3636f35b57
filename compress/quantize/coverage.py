"""How much of a prepared network computes in integers, by multiply-accumulates, and why the rest does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from compress.quantize.graph.annotate import FEWEST_UNITS, is_small, layer_of, weights_of
from compress.surgery import Captured

__all__ = ["Coverage", "Product", "coverage"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """One convolution, matrix product or recurrent layer of a graph.

    Args:
        layer: Module of the network whose code calls it.
        operator: What is called, as ``conv2d``.
        macs: Multiply-accumulates for the inputs given.
        integer: Whether its factors pass fake quantizers; of a recurrent layer the weights, since the engine
            quantises the rest.
        reason: Why it stays in floating point; empty for integers.
    """

    layer: str
    operator: str
    macs: int
    integer: bool
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """The products of a network.

    Args:
        products: In the order of the graph.
    """

    products: tuple[Product, ...]

    @property
    def share(self) -> float:
        """Share of multiply-accumulates in integers, 0 when there are none."""
        total = sum(product.macs for product in self.products)
        return sum(product.macs for product in self.products if product.integer) / max(1, total)

    @property
    def reasons(self) -> dict[str, float]:
        """Share of multiply-accumulates that stays in floating point, by reason, largest first."""
        total = max(1, sum(product.macs for product in self.products))
        found: dict[str, float] = {}
        for product in self.products:
            if not product.integer:
                found[product.reason] = found.get(product.reason, 0.0) + product.macs / total
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def coverage(prepared: Captured, inputs: Sequence[Tensor]) -> Coverage:
    """Count the multiply-accumulates of a prepared network that are in integers.

    Products are counted as the graph has them: attention in one operator as its two products, a recurrent layer as
    the products of its weights at every step.

    Args:
        prepared: From ``prepare``.
        inputs: As for the network; it runs once in evaluation.

    Example:
        >>> from compress.quantize import prepare
        >>> prepared = prepare(torch.nn.Linear(3, 2), [torch.ones(2, 3)], "int8")
        >>> coverage(prepared, [torch.ones(2, 3)]).share
        1.0
    """
    training = prepared.training
    prepared.eval().sync_mode()
    try:
        with torch.no_grad():
            counter = _Counter(prepared.graph_module)
            counter.run(*inputs)
    finally:
        prepared.training = training  # not by train(): parts keep their modes
        prepared.sync_mode()
    return Coverage(tuple(counter.products))


class _Counter(Interpreter):
    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.products: list[Product] = []

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        counted = _COUNTED.get(n.target)
        if counted is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            integer = all(self._is_rounded(factor) for factor in counted.factors(n))
            output = result[0] if isinstance(result, tuple) else result
            reason = "" if integer else _SMALL if is_small(n) else counted.reason
            macs = counted.macs(args, output)
            self.products.append(Product(layer_of(n), str(n.target).split(".")[1], macs, integer, reason))
        return result

    def _is_rounded(self, factor: Any) -> bool:
        if not (isinstance(factor, Node) and factor.op == "call_module"):
            return False
        return hasattr(self.module.get_submodule(str(factor.target)), "fake_quant_enabled")


@dataclass(frozen=True)
class _Counted:
    macs: Callable[[Sequence[Any], Tensor], int]
    factors: Callable[[Node], Sequence[Any]]
    reason: str


def _linear(args: Sequence[Any], output: Tensor) -> int:
    """The second argument's last size is what is summed over: a weight's of linear, a factor's of addmm."""
    return output.numel() * int(args[1].shape[-1])


def _convolution(args: Sequence[Any], output: Tensor) -> int:
    return output.numel() * math.prod(args[1].shape[1:])


def _transposed(args: Sequence[Any], output: Tensor) -> int:
    return int(args[0].numel() * math.prod(args[1].shape[1:]))


def _matmul(args: Sequence[Any], output: Tensor) -> int:
    return output.numel() * int(args[0].shape[-1])


def _attention(args: Sequence[Any], output: Tensor) -> int:
    query, key, value = args[:3]
    return int(query.numel() * key.shape[-2] + math.prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1])


def _einsum(args: Sequence[Any], output: Tensor) -> int:
    """The product of all labels' sizes, for two operands without an ellipsis; more are not counted."""
    terms = args[0].replace(" ", "").split("->")[0].split(",")
    if "." in args[0] or len(terms) > 2:
        return 0
    return math.prod({label: size for term, x in zip(terms, args[1]) for label, size in zip(term, x.shape)}.values())


def _recurrent(args: Sequence[Any], output: Tensor) -> int:
    weights = next(value for value in args[2:] if isinstance(value, list | tuple))
    return math.prod(output.shape[:2]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _first_two(node: Node) -> Sequence[Any]:
    return node.args[:2]


def _nothing(node: Node) -> Sequence[Any]:
    return (None,)


_KEPT = "kept in floating point by the scheme or by name, or its weight depends on the data"
_DATA = "a product of two activations"
_TRANSPOSED = "a transposed convolution, which ONNX Runtime and Inductor have in floats alone"
_WHOLE = "attention in one kernel"
_SMALL = f"a GRU of fewer than {FEWEST_UNITS} units, which is not faster in integers"

_COUNTED: dict[Any, _Counted] = {
    _aten.linear.default: _Counted(_linear, _first_two, _KEPT),
    _aten.conv1d.default: _Counted(_convolution, _first_two, _KEPT),
    _aten.conv2d.default: _Counted(_convolution, _first_two, _KEPT),
    _aten.conv3d.default: _Counted(_convolution, _first_two, _KEPT),
    _aten.conv_transpose1d.default: _Counted(_transposed, _first_two, _TRANSPOSED),
    _aten.conv_transpose2d.input: _Counted(_transposed, _first_two, _TRANSPOSED),
    _aten.conv_transpose3d.input: _Counted(_transposed, _first_two, _TRANSPOSED),
    _aten.matmul.default: _Counted(_matmul, _first_two, _DATA),
    _aten.bmm.default: _Counted(_matmul, _first_two, _DATA),
    _aten.mm.default: _Counted(_matmul, _first_two, _DATA),
    _aten.addmm.default: _Counted(_linear, lambda node: node.args[1:3], _DATA),
    _aten.baddbmm.default: _Counted(_linear, lambda node: node.args[1:3], _DATA),
    _aten.einsum.default: _Counted(_einsum, _nothing, _DATA),
    _aten.scaled_dot_product_attention.default: _Counted(_attention, _nothing, _WHOLE),
    _aten.lstm.input: _Counted(_recurrent, weights_of, _KEPT),
    _aten.gru.input: _Counted(_recurrent, weights_of, _KEPT),
    _aten.rnn_tanh.input: _Counted(_recurrent, _nothing, "a plain recurrent layer, which no engine has in integers"),
    _aten.rnn_relu.input: _Counted(_recurrent, _nothing, "a plain recurrent layer, which no engine has in integers"),
}
