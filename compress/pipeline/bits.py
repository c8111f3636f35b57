"""Measure what the weights of each layer lose at few bits, and share bits out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from operator import itemgetter
from typing import Any

from compress.distill import read_batch
from compress.distill.cache import fingerprint_module
from compress.errors import RecipeError
from compress.measure.reporting.bits import save_bits
from compress.measure.reporting.results import Bits
from compress.pipeline.judging import device_of, judge, validation
from compress.pipeline.rundir import RunDirectory
from compress.quantize.allocation import allocate_bits
from compress.quantize.schemes import get_scheme
from compress.quantize.sensitivity import BITS, capture_layers, measure_bits, num_weights
from compress.quantize.training.progressive import quantized_layers
from compress.surgery import Captured

__all__ = ["measure_layers", "read_bits", "schemes_of"]

_NAME = "bits"
_LAYERS = "layers"
_ORDER = "order"
_ALIKE = ("activation_bits", "number", "symmetric", "dynamic", "group_size", "linear_only", "attention")


def measure_layers(
    run: RunDirectory, stage: str, *, bits: Sequence[int] = BITS, average_bits: float | None = None
) -> None:
    """Measure the network with the weights of one layer after the other at few bits; what was stopped goes on.

    Leaves ``bits.json``, written anew after every point, and ``bits.png`` and ``.svg``; with a target, what
    each layer gets is in there, too, and ``layers.json`` says it as a recipe's ``quantize.layers``. ``order.json`` has
    the layers as ``quantize.progressive.order`` takes them, by their loss at the fewest bits.

    Args:
        run: The run directory; its recipe quantises.
        stage: Which of its networks.
        bits: Bits to try, 2 to 8; layers get some of these, whatever else was measured before.
        average_bits: Bits a weight may have on average, of those that are rounded: what stays in floats has no part.

    Raises:
        RecipeError: when bits are out of range, or the target is below the fewest.
        CaptureError: when the network cannot be quantised.
    """
    for num in bits:
        if not 2 <= num <= 8:
            raise RecipeError(f"bits: expected numbers from 2 to 8, got {num}. Use 8 4 2, say.")
    callback = run.recipe.quantize
    assert callback is not None
    network = run.network(stage)[0].to(device_of(run))
    loader, num_batches = validation(run)
    inputs = [tensor[:2].to(device_of(run)) for tensor in read_batch(next(iter(loader))).inputs]
    measured_on = f"{fingerprint_module(network)}, {num_batches} batches"
    before = read_bits(run)
    if before is not None and before.measured_on != measured_on:
        run.console.print(
            f"{run.json_file(_NAME)}: expected a measurement of this network, got another's. It is measured anew."
        )
        before = None
    rehearsed = callback.rehearse(copy.deepcopy(network), inputs)
    if isinstance(rehearsed, Captured):
        network = capture_layers(network, inputs, lengths=callback.lengths)
    sizes = num_weights(network)
    named = quantized_layers(rehearsed, sizes)
    curves = {} if before is None else {layer: points for layer, points in before.curves.items() if layer in sizes}

    def loss(changed: Any) -> dict[str, float]:
        return judge(run, changed, islice(loader, num_batches), device_of(run))

    result = Bits(
        stage=stage,
        metric=run.recipe.task.metric,
        measured_on=measured_on,
        whole=loss(network) if before is None else before.whole,
        sizes=sizes,
        curves=curves,
    )

    def on_point(layer: str, num: int, values: dict[str, float]) -> None:
        curves[layer] = sorted([*curves.get(layer, []), [num, values]], key=itemgetter(0), reverse=True)
        run.write_json(_NAME, asdict(result))
        run.console.print(f"{layer} at {num} bits: loss {values['loss']:.4f}", soft_wrap=True)

    done = {layer: {num: values for num, values in points} for layer, points in curves.items()}  # noqa: C416
    measured = measure_bits(network, loss, bits=bits, done=done, on_point=on_point)
    asked = replace(result, curves={layer: [*map(list, points.items())] for layer, points in measured.items()})
    if average_bits is not None:
        losses = {layer: of_layer for layer, of_layer in asked.losses().items() if layer in named}
        result = replace(result, chosen=allocate_bits(losses, asked.sizes, average_bits=average_bits))
    run.write_json(_NAME, asdict(result))
    run.write_json(_ORDER, [layer for layer in reversed(asked.ranked()) if layer in named])
    for path in save_bits(result, run.path):
        run.console.print(f"picture: {path}", soft_wrap=True)
    words = f'--quantize.progressive.order "$(cat {run.path / _ORDER}.json)"'
    run.console.print(f"to train with quantize.progressive in their order: {words}", soft_wrap=True)
    for layer, num in result.chosen.items():
        run.console.print(f"{layer}: {num} bits", soft_wrap=True)
    if result.chosen and not _is_plain(run):
        run.console.print(f"{_LAYERS}.json: written for quantize.scheme int8 and those of few weight bits alone")
    elif result.chosen:
        run.write_json(_LAYERS, schemes_of(result.chosen))
        path = run.path / f"{_LAYERS}.json"
        run.console.print(f'to train with them: --quantize.layers "$(cat {path})"', soft_wrap=True)


def schemes_of(bits: Mapping[str, int]) -> dict[str, str]:
    """Return what a recipe's ``quantize.layers`` says of layers whose weights have so many bits.

    Example:
        >>> schemes_of({"stem": 8, "fc": 4})
        {'stem': 'int8', 'fc': 'w4a8'}
    """
    return {layer: "int8" if num == 8 else f"w{num}a8" for layer, num in bits.items()}


def _is_plain(run: RunDirectory) -> bool:
    """Say whether the recipe's scheme is like those that are written, but for the bits of weights."""
    callback = run.recipe.quantize
    if callback is None:
        return True
    own, plain = callback.assignment.scheme, get_scheme("int8")
    return all(getattr(own, key) == getattr(plain, key) for key in _ALIKE)


def read_bits(run: RunDirectory) -> Bits | None:
    """Return what a run directory holds of a measurement, finished or not.

    Raises:
        RunError: when the file is another one.
    """
    return run.read_measurement(_NAME, Bits)
