"""Post-training quantization: the ranges of activations, from data that passes through the float network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.fx import Node

from compress.errors import DataError
from compress.measure.modes import kept_modes
from compress.quantize.fakes.finite import reader_of
from compress.quantize.parametrize import rounded_layers
from compress.quantize.ranges import Grid, Seen, around_zero, choose_range
from compress.surgery import Captured
from compress.surgery.lengths import Sizes, has_sizes, sizes_of

__all__ = ["calibrate", "float_mode"]

Batches = Iterable[Sequence[Tensor]]


def calibrate(
    prepared: nn.Module, batches: Batches, *, ranges: str = "mse", percentile: float = 99.99, progress: bool = False
) -> int:
    """Set what the integers of a prepared network stand for: activations by data, weights by their own extremes.

    Data passes through the network in floating point and in evaluation, embeddings as they will be looked up; nothing
    is trained.

    Args:
        prepared: From ``prepare`` or ``parametrize``.
        batches: Inputs of the network, a tuple of tensors each.
        ranges: How a range follows from what was seen, a key of ``RANGES``.
        percentile: How many of the values lie inside a range, for ``ranges="percentile"``.
        progress: Whether to show a progress bar.

    Returns:
        How many batches were seen.

    Raises:
        DataError: when there is no data, it does not fit the network, or an activation is not finite; the network's
            ranges stay as they were.
        RecipeError: when there is no such method.
    """
    activations, weights = _fake_quantizers(prepared)
    seen = {name: Seen() for name in activations}
    readers = _readers(prepared)
    hooks = [_watch(module, seen[name], readers.get(name, name)) for name, module in activations.items()]
    num = 0
    try:
        with _evaluating(prepared), float_mode(prepared), torch.no_grad():
            for inputs in track(batches, "calibrating", transient=True, disable=not progress):
                _check(prepared, inputs)
                prepared(*inputs)
                num += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not num:
        raise DataError("calibrate: expected at least one batch, got none. Give the training data's loader.")
    chosen = {
        name: choose_range(ranges, seen[name], _grid(module), percentile=percentile)
        for name, module in activations.items()
        if seen[name].lows
    }
    with torch.no_grad():
        for name, (low, high) in chosen.items():
            _set_range(activations[name], torch.tensor(low), torch.tensor(high))
        if isinstance(prepared, Captured):
            _measure_weights(prepared, weights, inputs)
        for name, layer in rounded_layers(prepared).items():
            if name in chosen or name not in activations:
                _set_range(weights[name], *_extremes(weights[name], layer._parameters["weight"]))
    return num


@contextmanager
def float_mode(prepared: nn.Module) -> Iterator[None]:
    """Let a prepared network compute without rounding or learning ranges, within the context."""
    modules: list[Any] = [m for m in prepared.modules() if hasattr(m, "fake_quant_enabled")]
    switches = [switch for module in modules for switch in (module.fake_quant_enabled, module.observer_enabled)]
    before = [int(switch[0]) for switch in switches]
    for switch in switches:
        switch[0] = 0
    try:
        yield
    finally:
        for switch, enabled in zip(switches, before):
            switch[0] = enabled


@contextmanager
def _evaluating(prepared: nn.Module) -> Iterator[None]:
    try:
        with kept_modes(prepared, training=False):
            yield
    finally:
        if isinstance(prepared, Captured):
            prepared.sync_mode()


def _fake_quantizers(prepared: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return those that data passes through, and those of weights, by name."""
    if not isinstance(prepared, Captured):
        layers = rounded_layers(prepared)
        taken = {name: layer.input_fake_quant for name, layer in layers.items() if layer.input_fake_quant is not None}
        return taken, {name: layer.weight_fake_quant for name, layer in layers.items()}
    graph_module = prepared.graph_module
    fed: set[Node] = set()
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if hasattr(module, "fake_quant_enabled"):
                found[node not in fed][str(node.target)] = module
    return found


def _readers(prepared: nn.Module) -> dict[str, str]:
    """Return the names of layers by those of the fake quantizers in a graph that they read."""
    nodes = prepared.graph_module.graph.nodes if isinstance(prepared, Captured) else ()
    return {str(node.target): reader_of(node) for node in nodes if node.op == "call_module"}


def _watch(module: nn.Module, seen: Seen, layer: str) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        try:
            seen.add(inputs[0])
        except ValueError as error:
            raise DataError(
                f"calibrate: expected finite activations, got others in what {layer!r} takes. Look for NaN in the data "
                "and in the network's outputs."
            ) from error

    return module.register_forward_pre_hook(hook)


def _check(prepared: nn.Module, inputs: Any) -> None:
    got = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    if any(isinstance(tensor, Tensor) and not tensor.numel() for tensor in got):
        raise DataError("calibrate: expected samples in each batch, got a batch of none. Leave it out.")
    if not isinstance(prepared, Captured):
        return  # its own code says what it takes
    wanted = [node.meta["val"] for node in prepared.graph_module.graph.nodes if node.op == "placeholder"]
    if len(got) != len(wanted) or not all(map(_fits, got, wanted, sizes_of(prepared.graph_module))):
        expected, shapes = ([_described(tensor) for tensor in tensors] for tensors in (wanted, got))
        raise DataError(
            f"calibrate: expected batches of (inputs, ...) with shapes (N, ...) = {', '.join(expected)}, got "
            f"{', '.join(shapes)}. Give what the network takes, without targets, and name what varies in lengths."
        )


def _fits(tensor: Any, wanted: Tensor, sizes: Sizes) -> bool:
    return (
        isinstance(tensor, Tensor)
        and (tensor.dtype == wanted.dtype or not (tensor.is_floating_point() or wanted.is_floating_point()))
        and has_sizes(tensor, sizes)
    )


def _described(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    sizes = [str(size) if isinstance(size, int) else "any" for size in tensor.shape[1:]]
    return f"({', '.join(['N', *sizes])}) {str(tensor.dtype).removeprefix('torch.')}"


def _grid(module: Any) -> Grid:
    observer = module.activation_post_process
    symmetric = observer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    return Grid(observer.quant_min, observer.quant_max, symmetric)


def _set_range(module: Any, low: Tensor, high: Tensor) -> None:
    """Note a range; the next pass makes a scale of it."""
    observer = module.activation_post_process
    for buffer, value in ((observer.min_val, low), (observer.max_val, high)):
        buffer.resize_(value.shape).copy_(value)


def _measure_weights(prepared: Captured, weights: dict[str, Any], inputs: Sequence[Tensor]) -> None:
    """Give each channel of a weight the range of its extremes, BatchNorm folded in, and every range its scale."""
    hooks = [
        module.register_forward_pre_hook(lambda own, given: _set_range(own, *_extremes(own, given[0])))
        for module in weights.values()
    ]
    training = prepared.training
    try:
        prepared.eval()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        prepared.training = training  # not by train(): parts keep their modes
        prepared.sync_mode()


def _extremes(module: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(module, "ranges"):  # few bits: what rounds best is far inside
        return module.ranges(weight)  # type: ignore[no-any-return]
    if not module.is_per_channel:
        return weight.min(), weight.max()
    rows = weight.movedim(module.ch_axis, 0).flatten(1)
    return around_zero(rows.amin(1), rows.amax(1))
