"""LSTMs with integer weights as what OpenVINO's CPU plugin computes in integers.

It does so where an LSTM's input and first hidden state come from ``FakeQuantize`` and its weights from int8. To oneDNN
it hands one scale for inputs and hidden states alike, that of the input, and for each gate one scale for both weights,
that of the input weights, whatever the others are (2026.4). So both are brought to common scales here. An input of
another range than hidden states have is divided by a number that its weights are multiplied by; where that would cost
the weights too much, it is cut into summands of less range, each with the same weights. And because two LSTMs of the
same sizes get the scales of the first, no two are left of the same sizes: inputs get features that are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["quantize_lstms"]

_MOVING = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "StridedSlice", "Gather", "Split", "VariadicSplit"}
_WITHIN_ONE = {"LSTMSequence", "Tanh", "Sigmoid", "Softmax"}
_STEPS = 127  # from zero to the limit
_MARGIN = 2  # around the largest number among example inputs, where nothing else says how large they get
_MOST_PARTS = 2  # a third makes it less than a tenth more exact, and a tenth slower
_CLEARLY = 0.8  # of the noise, for another part
_SPARE = 4  # features that are added at once
_TYPICAL = 0.3  # number, by the limit


@dataclass(frozen=True)
class _Span:
    """The limits of what an LSTM takes and gives.

    Args:
        x: Of its input.
        hidden: Of its hidden states.
    """

    x: float
    hidden: float

    def __bool__(self) -> bool:
        return 0 < self.x < np.inf and 0 < self.hidden <= 1


def quantize_lstms(model: Any, examples: Sequence[np.ndarray] | None, *, largest: int) -> int:
    """Rewrite each LSTM whose weights are dequantised integers, in place.

    Args:
        model: OpenVINO's, as read from a file.
        examples: Its inputs; they say how large an LSTM's input and states get where nothing else does. Without, an
            LSTM of which the graph does not say so is left as it is.
        largest: Of a weight's integers.

    Returns:
        How many were rewritten.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "LSTMSequence" and _is_integer(node)]
    if not found:
        return 0
    spans = list(_spans(found, model.get_parameters(), examples))  # before the first is replaced
    taken: set[tuple[Any, ...]] = set()
    for node, span in zip(found, spans):
        if span:
            _rewrite(node, span, largest, taken)
    model.validate_nodes_and_infer_types()
    return sum(map(bool, spans))


def _is_integer(node: Any) -> bool:
    """Say whether both weights are made of int8 constants, and the plugin has an LSTM of that kind."""
    given = node.get_attributes()
    return (
        given["activations"] == ["sigmoid", "tanh", "tanh"]
        and not given["clip"]
        and all("i8" in (_constants(node.input_value(place)) or ()) for place in (4, 5))
        and _constants(node.input_value(6)) is not None
    )


def _constants(output: Any) -> set[str] | None:
    """Return the types of the constants that a value is made of; ``None`` where it is made of inputs, too."""
    types, seen, todo = set(), set(), [output.get_node()]
    while todo:
        node = todo.pop()
        if node.get_name() in seen:
            continue
        seen.add(node.get_name())
        if node.get_type_name() == "Parameter":
            return None
        if node.get_type_name() == "Constant":
            types.add(node.get_element_type().get_type_name())
        todo += [value.get_node() for value in node.input_values()]
    return types


def _evaluate(outputs: Sequence[Any], parameters: Sequence[Any], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    import openvino.passes

    model = openvino.Model(list(outputs), list(parameters), "part").clone()
    passes = openvino.passes.Manager()
    passes.register_pass(openvino.passes.ConstantFolding())  # else an LSTM's weights are no constants to the plugin
    passes.run_passes(model)
    results = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(list(inputs))
    return [np.array(results[index]) for index in range(len(outputs))]


def _spans(nodes: Sequence[Any], parameters: Sequence[Any], examples: Sequence[np.ndarray] | None) -> Iterator[_Span]:
    places = [[node.input_value(0), node.input_value(1), node.output(0)] for node in nodes]
    if examples is not None:
        read = _evaluate([value for own in places for value in own], parameters, examples)
        sizes = [_MARGIN * float(np.abs(value).max(initial=0)) for value in read]
    else:
        sizes = [size for _, start, _ in places for size in (np.inf, _constant_size(start), 1.0)]
    for node, x, start, hidden in zip(nodes, sizes[::3], sizes[1::3], sizes[2::3]):
        known, source = _limit(node.input_value(0)), _source(node.input_value(0)).get_node()
        x = known if source.get_type_name() == "FakeQuantize" and known else min(x, known or np.inf)
        # Beyond one, only what a state is begun with can be.
        yield _Span(x, min(max(hidden, start), 1.0) if start <= _MARGIN else np.inf)


def _constant_size(output: Any) -> float:
    """Return the largest magnitude in a value that inputs change by their sizes alone, else infinity."""
    while output.get_node().get_type_name() in _MOVING | {"Broadcast"}:
        output = output.get_node().input_value(0)
    return np.inf if _constants(output) is None else float(np.abs(_evaluate([output], [], [])[0]).max(initial=0))


def _source(output: Any) -> Any:
    """Return the value whose numbers, moved only, a value consists of."""
    while output.get_node().get_type_name() in _MOVING:
        output = output.get_node().input_value(0)
    return output


def _limit(output: Any) -> float | None:
    """Return the largest magnitude that a value can have, where the graph says so."""
    output = _source(output)
    node, kind = output.get_node(), output.get_node().get_type_name()
    if kind == "Concat":
        limits = [_limit(value) for value in node.input_values()]
        known = [limit for limit in limits if limit is not None]
        return max(known) if len(known) == len(limits) else None
    if kind == "FakeQuantize":
        ends = [value.get_node() for value in node.input_values()[3:]]
        if all(end.get_type_name() == "Constant" for end in ends):
            return max(float(np.abs(end.data).max()) for end in ends)
    is_cell = kind == "LSTMSequence" and output.get_index() == 2
    return 1.0 if kind in _WITHIN_ONE and not is_cell else None


def _rewrite(node: Any, span: _Span, largest: int, taken: set[tuple[Any, ...]]) -> None:
    from openvino import opset13 as ops

    x, hidden, cell, lengths, *others = node.input_values()
    weights = _evaluate(others, [], [])
    given = node.get_attributes()
    directions = ["forward", "reverse"] if given["direction"] == "bidirectional" else [given["direction"]]
    states = [[value] for value in (hidden, cell)]
    if len(directions) > 1:
        states = [ops.split(value, 1, len(directions)).outputs() for value in (hidden, cell)]
    same_steps = _source(x).get_node().get_type_name() == "LSTMSequence"
    made = []
    for towards, first, first_cell, w, r, b in zip(
        directions, *states, *(np.split(each, len(each)) for each in weights)
    ):
        limit, parts = _plan(w[0], r[0], span, largest, same_steps=same_steps)
        spare = 0
        while (sizes := (parts * (w.shape[2] + spare), given["hidden_size"], towards)) in taken:
            spare += _SPARE
        taken.add(sizes)
        w = np.tile(np.pad(w * (limit / span.hidden), [(0, 0), (0, 0), (0, spare)]), parts)
        steps = np.maximum(*(np.abs(each).max(2, keepdims=True) for each in (w, r))) / largest
        steps = np.where(steps > 0, steps, 1).astype(np.float32)
        if _constants(first) is None:  # else the plugin quantises it
            first = _round(first, 0, span.hidden, span.hidden).output(0)
        lstm = ops.lstm_sequence(
            _cut(x, limit, span.hidden, parts=parts, spare=spare),
            first,
            first_cell,
            lengths,
            _dequantized(w, steps),
            _dequantized(r, steps),
            ops.constant(b),
            given["hidden_size"],
            towards,
        )
        lstm.set_friendly_name("/".join([node.get_friendly_name(), towards][: len(directions)]))
        made.append(lstm)
    for index, output in enumerate(node.outputs()):
        values = [each.output(index) for each in made]
        output.replace(values[0] if len(values) == 1 else ops.concat(values, 1).output(0))


def _plan(w: np.ndarray, r: np.ndarray, span: _Span, largest: int, *, same_steps: bool) -> tuple[float, int]:
    """Return the limit of each part of an input and into how many parts it is cut.

    The roundings of input, hidden states and both weights each add a variance to what the gates take. Of the limits,
    the one with the least sum is taken, and another part only where it makes the noise clearly less.

    Args:
        w: Input weights, shape (4 hidden, features).
        r: Hidden weights, shape (4 hidden, hidden).
        span: Limits of the input and of hidden states.
        largest: Of a weight's integers.
        same_steps: Whether the input within its limit is rounded already.
    """
    most = [np.abs(value).max(1) for value in (w, r)]
    squares = [float(np.square(value, dtype=np.float64).sum(1).mean()) for value in (w, r)]
    best: tuple[float, float, int] | None = None
    for parts in range(1, _MOST_PARTS + 1):
        if parts > 1 and parts * w.shape[1] > 2 * r.shape[1]:
            break
        for limit in span.x / parts * 2.0 ** np.arange(0, 5, 0.5):
            ratio = limit / span.hidden
            steps = float(np.square(np.maximum(ratio * most[0], most[1]) / largest).mean())
            states = squares[1] * (span.hidden / _STEPS) ** 2
            inputs = 0.0 if same_steps and limit == span.x else squares[0] * (limit / _STEPS) ** 2
            weights = w.shape[1] * (_TYPICAL * span.x / ratio) ** 2 + r.shape[1] * (_TYPICAL * span.hidden) ** 2
            noise = (states + inputs + steps * weights) ** 0.5
            if best is None or noise < best[0] * (1 if parts == best[2] else _CLEARLY):
                best = noise, float(limit), parts
    assert best is not None
    return best[1], best[2]


def _cut(x: Any, limit: float, hidden: float, *, parts: int, spare: int) -> Any:
    """Return summands of an input one beside the other, each with zeros added and stretched to the limit of states."""
    from openvino import opset13 as ops

    if spare:
        x = ops.pad(x, [0, 0, 0], [0, 0, spare], "constant", np.float32(0)).output(0)
    middles = limit * (2 * np.arange(parts) - parts + 1)
    summands = [_round(x, float(middle), limit, hidden) for middle in middles]
    return ops.concat(summands, 2) if parts > 1 else summands[0]


def _round(x: Any, middle: float, limit: float, hidden: float) -> Any:
    from openvino import opset13 as ops

    ends = [ops.constant(np.float32(end)) for end in (middle - limit, middle + limit, -hidden, hidden)]
    return ops.fake_quantize(x, *ends, levels=2 * _STEPS + 1)


def _dequantized(values: np.ndarray, steps: np.ndarray) -> Any:
    from openvino import Type
    from openvino import opset13 as ops

    integers = ops.constant(np.rint(values / steps).astype(np.int8))
    return ops.multiply(ops.convert(integers, Type.f32), ops.constant(steps))
