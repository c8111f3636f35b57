"""Measure what each layer brings and costs in integers, and leave the best layers in floats within a latency."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn

from compress.distill import read_batch
from compress.distill.cache import fingerprint_module
from compress.errors import RecipeError
from compress.export.calls import engine_call, repeat_samples
from compress.export.passes import clean_up
from compress.measure.latency import Latency, measure_latency
from compress.measure.machine import most_threads
from compress.measure.reporting.mixed import save_mixed
from compress.measure.reporting.results import Mixed
from compress.measure.threads import torch_threads
from compress.pipeline.judging import device_of, judge, validation
from compress.pipeline.rundir import RunDirectory
from compress.quantize.allocation import allocate_floats
from compress.quantize.calibrate import calibrate
from compress.quantize.layers import Assignment
from compress.quantize.pt2e import convert, prepare
from compress.quantize.schemes import FLOAT
from compress.quantize.sensitivity import capture_layers, num_weights
from compress.quantize.training.progressive import quantized_layers
from compress.runtime.engines import ENGINES
from compress.runtime.engines import device_of as engine_device
from compress.surgery.capture import export_program

__all__ = ["Deadline", "measure_mixed", "read_mixed", "with_floats"]

Value = TypeVar("Value")

_NAME = "mixed"
_LAYERS = "layers"
_SECONDS = 0.5  # of each network when two are compared
_MORE_SECONDS = 2.0  # where what is measured is believed
_MOST_CHOICES = 6


@dataclass(frozen=True)
class Deadline:
    """How long a call of the quantised network may take; one of the first two is given.

    Args:
        latency_ms: Milliseconds.
        latency: A fraction of what the network in floats takes.
        engine: What runs it, one on the CPU.
        batch: Samples in a call.
        threads: Threads of a call; the engine's default without it.

    Raises:
        RecipeError: when a value is out of range.
    """

    latency_ms: float | None = None
    latency: float | None = None
    engine: str = "onnxruntime"
    batch: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("latency_ms", "latency") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(f"latency: expected one of latency_ms and latency, got {len(given)}. Give one.")
        value = getattr(self, given[0])
        if not 0 < value < float("inf"):
            raise RecipeError(f"{given[0]}: expected a positive number, got {value:g}. Use 0.5, say.")
        on_cpu = [name for name in ENGINES if engine_device(name) == "cpu"]
        if self.engine not in on_cpu:
            raise RecipeError(f"engine: expected one of {', '.join(on_cpu)}, got {self.engine!r}. Choose one.")
        for name, num in (("batch", self.batch), ("threads", self.threads)):
            if num is not None and num < 1:
                raise RecipeError(f"{name}: expected at least 1, got {num}. Use 1.")
        if self.threads is not None and self.threads > most_threads():
            raise RecipeError(f"threads: expected at most {most_threads()}, got {self.threads}. Use 1.")

    def milliseconds(self, in_floats: float) -> float:
        """Return the most milliseconds, given what the network in floats takes."""
        return self.latency_ms if self.latency_ms is not None else (self.latency or 0) * in_floats


def measure_mixed(run: RunDirectory, stage: str, deadline: Deadline) -> None:
    """Quantise a network after training with one layer after the other in floats, and judge and time each.

    Layers that a deadline has room for stay in floats, where that loses least in sum; what is chosen is built and
    timed, and chosen anew with less room while it is too slow. Leaves ``mixed.json``, written anew after every layer,
    from which the same command goes on, ``mixed.png`` and ``.svg``, and ``layers.json``, which is what a recipe's
    ``quantize.layers`` takes. A network is timed in turn with the one in integers, and its ratio to that one counts.

    Args:
        run: The run directory; its recipe quantises.
        stage: Which of its networks.
        deadline: What a call may take.

    Raises:
        RecipeError: when the network is too slow with every layer in its faster form.
        CaptureError: when the network cannot be quantised.
        ExportSkippedError: when the engine cannot be given it.
    """
    bench = _Bench(run, stage, deadline)
    result = bench.start(_found(run, bench.measured_on))
    for layer in track(bench.layers, "measuring layers", transient=True, console=run.console):
        if layer not in result.layers:
            result.layers[layer] = bench.measure([layer])
            run.write_json(_NAME, asdict(result))
            values = result.layers[layer]
            words = f"{layer} in floats: loss {values['loss']:.4f}, {values['ms']:.4g} ms"
            run.console.print(words, soft_wrap=True, highlight=False)
    wanted = deadline.milliseconds(result.floats["ms"])
    # What an earlier target has led to holds no longer, whatever becomes of this one.
    result = replace(result, wanted_ms=None, chosen=[], reached=None)
    run.write_json(_NAME, asdict(result))
    (run.path / f"{_LAYERS}.json").unlink(missing_ok=True)
    chosen, reached = _choose(result, wanted, partial(bench.measure, seconds=_MORE_SECONDS))
    result = replace(result, wanted_ms=wanted, chosen=chosen, reached=reached)
    run.write_json(_NAME, asdict(result))
    for path in save_mixed(result, run.path):
        run.console.print(f"picture: {path}", soft_wrap=True)
    _tell(run, result)


def read_mixed(run: RunDirectory) -> Mixed | None:
    """Return what a run directory holds of a measurement, finished or not.

    Raises:
        RunError: when the file is another one.
    """
    return run.read_measurement(_NAME, Mixed)


def _choose(
    result: Mixed, wanted: float, measure: Callable[[Sequence[str]], dict[str, float]]
) -> tuple[list[str], dict[str, float]]:
    """Return layers to leave in floats, and the network with them: the first choice that is measured in time.

    Times of layers add up while few are in floats; all of them are the network in floats, whose time is known.
    """
    everything = list(result.layers), result.floats
    in_time = result.floats["ms"] <= wanted
    if in_time and result.floats["loss"] <= result.integers["loss"]:
        return everything
    gains, times = result.gains(), result.times()
    room = allowed = wanted - result.integers["ms"]
    fastest = sum(min(0.0, time) for time in times.values())
    if fastest > room:
        if in_time:
            return everything
        raise RecipeError(
            f"latency_ms: expected at least {result.integers['ms'] + fastest:.4g}, every layer in its faster form, got "
            f"{wanted:.4g}. Allow more, prune first, or choose another engine."
        )
    tried: list[list[str]] = []
    while (chosen := allocate_floats(gains, times, budget=room)) not in tried[-1:] and len(tried) < _MOST_CHOICES:
        tried.append(chosen)
        reached = measure(chosen) if chosen else result.integers
        spent = reached["ms"] - result.integers["ms"]
        if spent <= allowed:
            return chosen, reached
        predicted = sum(times[layer] for layer in chosen)
        if predicted > 0 and allowed > 0:  # as if every layer took more by the same factor
            room = max(fastest, predicted * allowed / spent)
        else:
            room = max(fastest, min(room, predicted) - (spent - allowed))
    if in_time:
        return everything
    raise RecipeError(
        f"latency_ms: expected a choice that is measured within {wanted:.4g}, got {reached['ms']:.4g} after "
        f"{len(tried)} of them: times of layers do not add up here. Allow more."
    )


class _Bench:
    """Quantises, judges and times one network, with some of its layers in floats."""

    def __init__(self, run: RunDirectory, stage: str, deadline: Deadline) -> None:
        callback = run.recipe.quantize
        assert callback is not None
        self._run, self._stage, self._deadline, self._callback = run, stage, deadline, callback
        self._network = run.network(stage)[0].eval()
        self._loader, self._num_batches = validation(run)
        self._inputs = [tensor[:2] for tensor in run.held_out]
        self._call_inputs = [repeat_samples(tensor, deadline.batch) for tensor in run.held_out]
        self._batches = _training_inputs(run, callback.num_batches)
        self._integers, converted = self._quantized([])
        named = num_weights(capture_layers(copy.deepcopy(self._network), self._inputs))
        self.layers = quantized_layers(self._integers, named)
        self._base = self._call(converted)
        self._base_ms = 0.0

    @property
    def measured_on(self) -> str:
        """What would make it another measurement."""
        words = [fingerprint_module(self._network), f"{self._num_batches} batches", str(self._callback.assignment)]
        words += [f"{len(self._batches)} to calibrate, {self._callback.ranges} {self._callback.percentile}"]
        return ", ".join([*words, str(replace(self._deadline, latency_ms=1, latency=None))])

    def start(self, before: Mixed | None) -> Mixed:
        """Measure the network in floats and in integers, unless that has been done."""
        if before is not None:
            self._base_ms = before.integers["ms"]
            return before
        floats = self._call(self._network)
        measured = self._times({"integers": self._base, "floats": floats}, _MORE_SECONDS)
        self._base_ms = measured["integers"].p50_ms
        deadline = self._deadline
        return Mixed(
            stage=self._stage,
            metric=self._run.recipe.task.metric,
            engine=deadline.engine,
            batch=deadline.batch,
            threads=deadline.threads,
            measured_on=self.measured_on,
            floats={**self._judge(self._network), "ms": measured["floats"].p50_ms},
            integers={**self._judge(self._integers), "ms": self._base_ms},
            layers={},
        )

    def measure(self, in_floats: Sequence[str], seconds: float = _SECONDS) -> dict[str, float]:
        """Return loss, metrics and milliseconds of the network with some layers in floats, the others in integers."""
        if set(in_floats) == set(self.layers):
            network, call = self._network, self._call(self._network)
        else:
            network, converted = self._quantized(in_floats)
            call = self._call(converted)
        measured = self._times({"integers": self._base, "mixed": call}, seconds)
        ratio = measured["mixed"].p50_ms / measured["integers"].p50_ms
        return {**self._judge(network), "ms": self._base_ms * ratio}

    def _times(self, calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Latency]:
        with torch_threads(self._deadline.threads):
            return measure_latency(calls, seconds=seconds)

    def _quantized(self, in_floats: Sequence[str]) -> tuple[nn.Module, nn.Module]:
        own = self._callback.assignment
        assignment = replace(own, layers=with_floats(own.layers, in_floats, FLOAT))
        prepared = prepare(copy.deepcopy(self._network), self._inputs, assignment, lengths=self._callback.lengths)
        calibrate(prepared, self._batches, ranges=self._callback.ranges, percentile=self._callback.percentile)
        return prepared, convert(prepared)

    def _call(self, network: nn.Module) -> Callable[[], object]:
        program, _ = clean_up(export_program(network, self._inputs))
        deadline = self._deadline
        return engine_call(program, self._call_inputs, deadline.engine, num_threads=deadline.threads)

    def _judge(self, network: nn.Module) -> dict[str, float]:
        device = device_of(self._run)
        values = judge(self._run, network.to(device), islice(self._loader, self._num_batches), device)
        network.cpu()
        return values


def with_floats(layers: Mapping[str, Value], in_floats: Sequence[str], floats: Value) -> dict[str, Value]:
    """Return patterns of layers and what they get, with some layers in floats: the last pattern that matches counts.

    Example:
        >>> with_floats({"fc": "w4a8", "*": "int8"}, ["fc"], "float")
        {'*': 'int8', 'fc': 'float'}
    """
    return {name: value for name, value in layers.items() if name not in in_floats} | dict.fromkeys(in_floats, floats)


def _training_inputs(run: RunDirectory, num_batches: int) -> list[tuple[Tensor, ...]]:
    """Return the same training inputs in every process, to calibrate with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.recipe.seed)
        return [read_batch(batch).inputs for batch in islice(run.recipe.data.train_dataloader(), num_batches)]


def _found(run: RunDirectory, measured_on: str) -> Mixed | None:
    before = read_mixed(run)
    if before is not None and before.measured_on != measured_on:
        run.console.print(
            f"{run.json_file(_NAME)}: expected a measurement of this network, got another's. It is measured anew."
        )
        return None
    return before


def _tell(run: RunDirectory, result: Mixed) -> None:
    """Say what was found, and how a recipe takes it."""
    assert result.reached is not None
    metric = result.metric
    for name, values in {
        "floats": result.floats,
        "integers": result.integers,
        f"{len(result.chosen)} of {len(result.layers)} layers in floats": result.reached,
    }.items():
        text = f"{name}: {values['ms']:.4g} ms, loss {values['loss']:.4f}, {metric} {values[metric]:.4f}"
        run.console.print(text, soft_wrap=True, highlight=False)
    if result.reached == result.floats:
        run.console.print("the network in floats is fast enough: nothing needs to be quantised")
        return
    own: Assignment = run.recipe.quantize.assignment  # type: ignore[union-attr]
    layers = with_floats({pattern: scheme.name for pattern, scheme in own.layers.items()}, result.chosen, "float")
    run.write_json(_LAYERS, layers)
    words = f'--quantize.layers "$(cat {run.path / _LAYERS}.json)"'
    run.console.print(f"to train with them: {words}", soft_wrap=True, highlight=False)
