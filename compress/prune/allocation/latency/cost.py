"""Latency as a currency."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram

from compress.export.calls import engine_call, repeat_samples
from compress.measure.latency import time_calls
from compress.measure.threads import torch_threads
from compress.prune.allocation.latency.layers import LAYER_CALLS
from compress.prune.allocation.latency.store import Store, typical_ms
from compress.prune.allocation.latency.table import NOTHING, TimedWork, measure_layers
from compress.prune.allocation.sizes import Sizes
from compress.prune.allocation.targets import Target
from compress.prune.allocation.work import list_work
from compress.prune.anatomy import Anatomy
from compress.surgery.capture import export_program

__all__ = ["LatencyCost", "network_call"]

log = logging.getLogger(__name__)

_SECONDS = 0.5  # of each network in a round
_NUM_ROUNDS = 4
_MOST_ROUNDS = 16
_PRECISION = 0.01
_DRIFT = 0.1


class LatencyCost:
    """Milliseconds of one undisturbed call on an engine, of the float network on this machine's CPU.

    Estimates are sums over convolutions and matrix products, each timed alone at a few widths; what lies between them
    (additions, pooling, the engine's own overhead) is left to whoever compares them with measurements. An engine that
    takes seconds to compile a layer has the table of torch's own kernels, which it calls for most layers.

    Args:
        anatomy: The network.
        target: Engine, batch and threads.
    """

    def __init__(self, anatomy: Anatomy, target: Target) -> None:
        self._anatomy = anatomy
        self._target = target
        self._sizes = Sizes(anatomy)
        self._store = Store(target.engine, target.threads)
        self._drifted = False

    def estimate(self, widths: Mapping[str, int]) -> float:
        """Return the sum of its layers' times at some widths; the first call measures what is not known yet."""
        removed = self._sizes.removed(widths)
        work, milliseconds = self._timed
        return sum(each.time(removed, milliseconds) for each in work)

    def measure(self, network: nn.Module, inputs: Sequence[Tensor]) -> float:
        """Return the time of the whole network, from memory where one of the same graph and sizes has been measured.

        It is measured in turn with the network that is about to be pruned, whose time is known: what comes out is that
        time multiplied by the ratio of the two, so that other work on this machine meets both alike. Rounds go on until
        they agree on the ratio; the log says where they do not, and where the machine has become faster or slower.

        Raises:
            CaptureError: when it cannot be exported with a dynamic batch dimension.
            ExportError: when the engine cannot be given it.
        """
        form = _Form.of(network, inputs, self._target)
        known = self._store.networks
        if form.key not in known:
            calls = {each.key: each.call(self._target) for each in (self._before, form)}
            with torch_threads(self._target.threads):
                now, ratio = _compare(calls, self._before.key, form.key)
            if self._before.key in known:
                self._watch(now / known[self._before.key])
            known.setdefault(self._before.key, now)
            known.setdefault(form.key, known[self._before.key] * ratio)
            self._store.save()
        return known[form.key]

    def _watch(self, drift: float) -> None:
        """Say that milliseconds of now are not those of the store."""
        if self._store.path is not None and abs(drift - 1) > _DRIFT and not self._drifted:
            self._drifted = True
            log.warning(
                "prune.target: the network takes %.2f times what it took when this machine was first measured; "
                "milliseconds are still of then. On a machine that stays so, delete %s.",
                drift,
                self._store.path,
            )

    @cached_property
    def _before(self) -> _Form:
        return _Form.of(self._anatomy.network, self._anatomy.inputs, self._target)

    @cached_property
    def _timed(self) -> tuple[list[TimedWork], dict[str, float]]:
        target = self._target
        samples = target.batch / len(self._anatomy.inputs[0])
        engine = target.engine if target.engine in LAYER_CALLS else "eager"
        work = [TimedWork.of(each, engine, samples=samples) for each in list_work(self._anatomy, self._sizes)]
        store = self._store if engine == target.engine else Store(engine, target.threads)
        layers = [layer for each in work for layer in each.layers()]
        with torch_threads(target.threads):
            measure_layers(layers, store, engine, target.threads)
        return work, {key: store.layers[key] for key in {NOTHING.key, *(layer.key for layer in layers)}}


def _compare(calls: Mapping[str, Callable[[], object]], base: str, other: str) -> tuple[float, float]:
    """Return milliseconds of one call and what the other takes of it, in as many rounds as it takes to agree."""
    times: list[float] = []
    ratios: list[float] = []
    while len(ratios) < _MOST_ROUNDS:
        timed = time_calls(calls, seconds=_SECONDS, warmup=2, min_runs=6)
        measured = {key: typical_ms(each) for key, each in timed.items()}
        times.append(measured[base])
        ratios.append(measured[other] / measured[base])
        if len(ratios) >= _NUM_ROUNDS and _error(ratios) <= _PRECISION:
            break
    else:
        log.warning(
            "prune.target: after %d rounds a network's time is known to %.1f %% only: "
            "this machine is busy with other work",
            len(ratios),
            100 * _error(ratios),
        )
    return float(np.median(times)), float(np.median(ratios))


def _error(ratios: Sequence[float]) -> float:
    """Return the standard error of the median of ratios, relative to it, from the quartiles."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    # A normal distribution's quartiles are 1.349 deviations apart; the median errs by 1.253 times what the mean does.
    return float((high - low) / 1.349 * 1.253 / math.sqrt(len(ratios)) / middle)


def network_call(network: nn.Module, inputs: Sequence[Tensor], target: Target) -> Callable[[], object]:
    """Return a call of a network on a target's engine, as its latency is measured.

    Args:
        network: Left untouched.
        inputs: Example inputs, at least two samples each.
        target: Engine, batch and threads.

    Raises:
        CaptureError: when it cannot be exported with a dynamic batch dimension.
        ExportError: when the engine cannot be given it.
    """
    return _Form.of(network, inputs, target).call(target)


class _Form:
    """A network in the form in which an engine is given it.

    Args:
        program: The network.
        batch: What it is called with.
    """

    def __init__(self, program: ExportedProgram, batch: Sequence[Tensor]) -> None:
        self._program = program
        self._batch = batch
        self._made: Callable[[], object] | None = None
        self.key = _structure(program, batch)

    @classmethod
    def of(cls, network: nn.Module, inputs: Sequence[Tensor], target: Target) -> _Form:
        """Export a network, left untouched."""
        twin = copy.deepcopy(network).cpu().eval()
        given = [tensor.detach().cpu() for tensor in inputs]
        return cls(export_program(twin, given), [repeat_samples(tensor, target.batch) for tensor in given])

    def call(self, target: Target) -> Callable[[], object]:
        """Build it for the target's engine, once."""
        if self._made is None:
            self._made = engine_call(self._program, self._batch, target.engine, num_threads=target.threads)
        return self._made


def _structure(program: ExportedProgram, batch: Sequence[Tensor]) -> str:
    """Return what stands for the operators and sizes of a network, whatever its weights."""
    tensors = {**program.state_dict, **program.constants}
    sizes = [(name, *tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, Tensor)]
    given = [(tuple(tensor.shape), tensor.dtype) for tensor in batch]
    return hashlib.sha256(f"{program.graph}{sizes}{given}".encode()).hexdigest()[:32]
