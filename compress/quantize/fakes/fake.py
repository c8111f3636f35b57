"""Fake quantization of tensors to any number of bits, in the form that PT2E prepares and converts.

The range that integers stand for is state, ``min_val`` and ``max_val`` of the observer, and the scale follows from it:
calibration sets the one and the other comes along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantize, PerChannelMinMaxObserver

from compress.quantize.fakes.finite import keep_finite, known
from compress.quantize.fakes.rounding import round_rows, round_to_steps
from compress.quantize.graph.normalize import constant_of

__all__ = [
    "DynamicFakeQuantize",
    "Float8FakeQuantize",
    "GroupFakeQuantize",
    "LeastSquaresObserver",
    "RangeFakeQuantize",
    "best_scale",
    "scale_of",
    "write_clips",
]

_NUM_ITERATIONS = 30
_LARGEST_FLOAT8 = 448.0


def scale_of(low: Tensor, high: Tensor, quant_min: int, quant_max: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point with which integers cover a range; zero always is an integer.

    Args:
        low: The least value, any shape.
        high: The largest value, the same shape.
        quant_min: The least integer.
        quant_max: The largest integer.
        symmetric: Whether zero lies in the middle of the integers.

    Example:
        >>> scale_of(torch.tensor(-4.0), torch.tensor(14.0), -8, 7, symmetric=True)
        (tensor(2.), tensor(0, dtype=torch.int32))
        >>> scale_of(torch.tensor(-4.0), torch.tensor(26.0), 0, 15, symmetric=False)
        (tensor(2.), tensor(2, dtype=torch.int32))
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    tiny = torch.finfo(torch.float32).eps
    if symmetric:
        middle = (quant_min + quant_max + 1) // 2
        scale = torch.maximum(low / (quant_min - middle), high / (quant_max - middle)).clamp(min=tiny)
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=tiny)
    return scale, (quant_min - low / scale).round().clamp(quant_min, quant_max).to(torch.int32)


def best_scale(rows: Tensor, quant_min: int, quant_max: int, *, start: Tensor | None = None, steps: int = 1) -> Tensor:
    r"""Return for each row the scale whose rounding costs least, by steps that never cost more.

    .. math:: s \leftarrow \langle w, q \rangle / \langle q, q \rangle, \quad q = clip(round(w / s))

    The first half of a step is the best integers for a scale, the second the best scale for integers (Zhang et al.
    2018, arXiv:1807.10029, section 3.3, for integers that are equally spaced).

    Args:
        rows: Weights, shape (C, n).
        quant_min: The least integer.
        quant_max: The largest integer.
        start: Scales to begin with, shape (C,); by default those that clip nothing.
        steps: How many.

    Returns:
        Shape (C,); a row of zeros keeps what it began with.
    """
    scale = (
        start if start is not None else scale_of(rows.amin(1), rows.amax(1), quant_min, quant_max, symmetric=True)[0]
    )
    for _ in range(steps):
        integers = (rows / scale[:, None]).round().clamp(quant_min, quant_max)
        squares = (integers * integers).sum(1)
        scale = torch.where(squares > 0, (rows * integers).sum(1) / squares.clamp(min=1), scale)
    return scale


class LeastSquaresObserver(PerChannelMinMaxObserver):  # type: ignore[misc]
    """Follows weights with the ranges that cost them least in squared error; one step for each call is enough."""

    def forward(self, weight: Tensor) -> Tensor:
        """Move the ranges to a weight, shape as the weight."""
        first = not self.min_val.numel()
        start = None if first else self.min_val / self.quant_min
        self.note(*self.ranges(weight.detach(), start=start, steps=_NUM_ITERATIONS if first else 1))
        return weight

    def ranges(
        self, weight: Tensor, *, start: Tensor | None = None, steps: int = _NUM_ITERATIONS
    ) -> tuple[Tensor, Tensor]:
        """Return the least and the largest value of each channel's integers, shape (C,) each."""
        rows = weight.float().movedim(self.ch_axis, 0).flatten(1)
        scale = best_scale(rows, self.quant_min, self.quant_max, start=start, steps=steps)
        return scale * self.quant_min, scale * self.quant_max

    def note(self, low: Tensor, high: Tensor) -> None:
        """Set the ranges."""
        for buffer, value in ((self.min_val, low), (self.max_val, high)):
            buffer.resize_(value.shape).copy_(value)


class RangeFakeQuantize(FakeQuantize):  # type: ignore[misc]
    """Rounds to the integers of its observer's range, gradients passing straight through inside it.

    Values that are not finite move no range.

    Converted, integers of few bits lie in an int8 or uint8 tensor; engines clip at the ends of that type, so the clip
    at the ends of the range becomes an operator of its own (``write_clips``).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return values as they come back from integers, same shape."""
        self.observe(x.detach())
        if self.fake_quant_enabled[0] == 0 or not self.follow():
            return x
        return self.round(x)

    def follow(self) -> bool:
        """Set the scale by the range, where one is known, and say whether one is."""
        observer = self.activation_post_process
        if not (observer.max_val.numel() and bool(torch.isfinite(observer.max_val).all())):
            return False
        scale, zero = self.scale_of(observer.min_val, observer.max_val)
        for buffer, value in ((self.scale, scale.reshape(-1)), (self.zero_point, zero.reshape(-1))):
            buffer.resize_(value.shape).copy_(value)
        return True

    def observe(self, x: Tensor) -> None:
        """Move the range, when ranges are being learned."""
        if self.observer_enabled[0] == 1:
            observer = self.activation_post_process
            before = known(observer)
            observer(x)
            keep_finite((observer.min_val, observer.max_val), before)

    def scale_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point for a range."""
        symmetric = self.qscheme in (torch.per_channel_symmetric, torch.per_tensor_symmetric)
        return scale_of(low, high, self.quant_min, self.quant_max, symmetric=symmetric)

    def round(self, x: Tensor) -> Tensor:
        """Return values as they come back with the scale that has been found."""
        if self.is_per_channel:
            return round_rows(x, self.scale, self.zero_point, self.quant_min, self.quant_max, axis=self.ch_axis)
        return round_to_steps(x, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def ranges(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range of each of a weight's channels, which calibration sets."""
        ranges: tuple[Tensor, Tensor] = self.activation_post_process.ranges(weight)
        return ranges


class DynamicFakeQuantize(RangeFakeQuantize):
    """Rounds to integers over the range of what it is given, in training, evaluation and at run time."""

    def observe(self, x: Tensor) -> None:
        """Take the range of these values."""
        observer = self.activation_post_process
        observer.min_val.copy_(x.amin())
        observer.max_val.copy_(x.amax())


class GroupFakeQuantize(RangeFakeQuantize):
    """Rounds a matrix with a scale for each group of neighbours in a row.

    Args:
        group_size: How many; a matrix whose rows this does not divide has one scale a row.
        arguments: Of ``RangeFakeQuantize``.
    """

    def __init__(self, *, group_size: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Return a matrix as it comes back from integers, same shape (O, I)."""
        return super().forward(self._rows(x)).reshape(x.shape)

    def ranges(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range of each group, shape (O * I / group_size,)."""
        return super().ranges(self._rows(weight))

    def convert(self, graph_module: GraphModule, node: Node) -> None:
        """Put integers (O, G, I / G), their scales (O, G, 1) and the way back in place of a float weight."""
        weight = constant_of(graph_module, node.args[0])
        shape = (weight.shape[0], -1, self._rows(weight).shape[1])
        scale = self.scale.reshape(weight.shape[0], -1, 1)
        integers = (weight.reshape(shape) / scale).round().clamp(self.quant_min, self.quant_max).to(torch.int8)
        with graph_module.graph.inserting_before(node):
            values = _stored(graph_module, f"{node.target}_integers", integers)
            values = _call(graph_module, torch.ops.aten.to.dtype, values, torch.float32)
            values = _call(
                graph_module, torch.ops.aten.mul.Tensor, values, _stored(graph_module, f"{node.target}_scale", scale)
            )
            values = _call(graph_module, torch.ops.aten.reshape.default, values, list(weight.shape))
        _replace(graph_module, node, values)

    def _rows(self, weight: Tensor) -> Tensor:
        size = self.group_size if weight.shape[1] % self.group_size == 0 else weight.shape[1]
        return weight.reshape(-1, size)


class Float8FakeQuantize(RangeFakeQuantize):
    """Rounds to float8 of 4 exponent and 3 mantissa bits, scaled so that the range ends at the largest of them, 448.

    Micikevicius et al. 2022, arXiv:2209.05433. Its observer's integers are so many that calibration clips nothing:
    what floats lose does not depend on the scale.
    """

    def scale_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale for a range; the zero point is zero."""
        scale = (torch.maximum(-low, high) / _LARGEST_FLOAT8).clamp(min=torch.finfo(torch.float32).tiny)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def round(self, x: Tensor) -> Tensor:
        """Return values as they come back from float8."""
        scale = self._wide_scale(x.dim())
        clipped = torch.maximum(torch.minimum(x, _LARGEST_FLOAT8 * scale), -_LARGEST_FLOAT8 * scale)
        back = (clipped.detach() / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
        return clipped + (back - clipped).detach()

    def convert(self, graph_module: GraphModule, node: Node) -> None:
        """Put casts in its place; a weight is stored in float8."""
        source = node.args[0]
        assert isinstance(source, Node)
        with graph_module.graph.inserting_before(node):
            if self.is_per_channel:
                weight = constant_of(graph_module, source)
                scale = self._wide_scale(weight.dim())
                narrow = (weight / scale).clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8).to(torch.float8_e4m3fn)
                values = _stored(graph_module, f"{node.target}_float8", narrow)
                back: Any = _stored(graph_module, f"{node.target}_scale", scale)
            else:
                back = float(self.scale)
                values = _call(graph_module, torch.ops.aten.div.Tensor, source, back)
                values = _call(graph_module, torch.ops.aten.clamp.default, values, -_LARGEST_FLOAT8, _LARGEST_FLOAT8)
                values = _call(graph_module, torch.ops.aten.to.dtype, values, torch.float8_e4m3fn)
            values = _call(graph_module, torch.ops.aten.to.dtype, values, torch.float32)
            values = _call(graph_module, torch.ops.aten.mul.Tensor, values, back)
        _replace(graph_module, node, values)

    def ranges(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the extremes of each channel."""
        rows = weight.movedim(self.ch_axis, 0).flatten(1)
        return rows.amin(1), rows.amax(1)

    def _wide_scale(self, num_dimensions: int) -> Tensor:
        if not self.is_per_channel:
            return self.scale.reshape(())
        return self.scale.reshape([-1 if axis == self.ch_axis else 1 for axis in range(num_dimensions)])


def write_clips(graph_module: GraphModule) -> None:
    """Put a clip before each quantization whose integers do not fill their type: engines clip at the type's ends."""
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    for node in list(graph_module.graph.nodes):
        if node.target is not quantize:
            continue
        x, scale, zero, low, high, dtype = node.args
        if high - low >= torch.iinfo(dtype).max - torch.iinfo(dtype).min - 1:  # the one more that symmetry leaves out
            continue
        least = None if low == torch.iinfo(dtype).min else (low - zero) * scale
        with graph_module.graph.inserting_before(node):
            clipped = graph_module.graph.call_function(torch.ops.aten.clamp.default, (x, least, (high - zero) * scale))
        clipped.meta = dict(x.meta)
        node.update_arg(0, clipped)
    graph_module.recompile()


def _stored(graph_module: GraphModule, name: str, value: Tensor) -> Node:
    name = name.replace(".", "_")
    graph_module.register_buffer(name, value.detach().clone())
    return graph_module.graph.get_attr(name)


def _call(graph_module: GraphModule, target: Any, *args: Any) -> Node:
    return graph_module.graph.call_function(target, args)


def _replace(graph_module: GraphModule, node: Node, values: Node) -> None:
    values.meta = dict(node.meta)
    node.replace_all_uses_with(values)
    graph_module.graph.erase_node(node)
