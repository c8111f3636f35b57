"""Measure what each layer's least important units are worth, before anything is pruned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

import torch
from pytorch_lightning.utilities import move_data_to_device
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from compress.distill import read_batch
from compress.distill.cache import fingerprint_module, fingerprint_tensors
from compress.errors import EditError, RecipeError, RunError
from compress.measure.reporting.report import Sensitivity
from compress.measure.reporting.sensitivity import save_sensitivity
from compress.measure.reporting.table import sensitivity_table
from compress.pipeline.bits import measure_layers
from compress.pipeline.fit import fit_baseline
from compress.pipeline.judging import device_of, judge, validation
from compress.pipeline.mixed import Deadline, measure_mixed
from compress.pipeline.rundir import RunDirectory
from compress.prune import CRITERIA, Anatomy, StructuredPruning, measure_sensitivity, score_groups, study
from compress.prune.criteria import Gradients, measure_activations
from compress.prune.sensitivity import RATIOS, num_silent
from compress.quantize.layers import engine_mistakes
from compress.quantize.sensitivity import BITS
from compress.runtime.engines import missing_package

__all__ = ["read_sensitivity", "sensitivity"]

_NAME = "sensitivity"


def sensitivity(
    run: RunDirectory,
    *,
    ratios: Sequence[float] = RATIOS,
    bits: Sequence[int] = BITS,
    average_bits: float | None = None,
    deadline: Deadline | None = None,
) -> None:
    """Measure the network before pruning with part of each layer silent; a measurement that was stopped goes on.

    Where the recipe quantises, the weights of each layer are also measured at few bits, and that alone where it does
    not prune. With a deadline each layer is measured in integers and in floats instead, of the pruned network where
    the run has it. The network is the distilled student where the run has it, else the student alone, which is trained
    first. Leaves ``sensitivity.json``, written anew after every point, and ``sensitivity.png`` and ``.svg``.

    Args:
        run: The run directory.
        ratios: Fractions of each layer's units to silence, between 0 and 1.
        bits: Bits of weights to try, 2 to 8.
        average_bits: Share bits out so that a weight has so many on average, at most.
        deadline: Leave layers in floats as far as this leaves time.

    Raises:
        RecipeError: when a ratio is out of range, or the recipe does not quantise what is to meet a deadline.
        EditError: when the student has nothing that can be pruned.
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise RecipeError(
                f"ratios: expected fractions between 0 and 1, got {ratio:g}. Use 0.5 for half of a layer."
            )
    _check_targets(run, average_bits, deadline)
    stages = [stage for stage in ("distilled", "pruned") if run.snapshot(stage).exists()]
    stage = stages[-1 if deadline else 0] if stages else "baseline"
    if stage == "baseline":
        fit_baseline(run)
    if not run.is_main_process:
        return
    run.console.rule(Text.assemble(("sensitivity", "bold"), f" of the network of stage {stage!r}"))
    if deadline is not None:
        measure_mixed(run, stage, deadline)
        return
    if run.recipe.quantize is not None:
        measure_layers(run, stage, bits=bits, average_bits=average_bits)
        if run.recipe.prune is None:
            return
    measured = _measure(run, stage, ratios)
    for path in save_sensitivity(measured, run.path):
        run.console.print(f"picture: {path}", soft_wrap=True)
    run.console.print(sensitivity_table(measured))


def _check_targets(run: RunDirectory, average_bits: float | None, deadline: Deadline | None) -> None:
    if deadline is None:
        return
    if average_bits is not None:
        raise RecipeError("average_bits: expected none beside a latency, got both. Give one of them.")
    if run.recipe.quantize is None:
        raise RecipeError(
            "latency: expected a recipe that quantises, got one without a quantize section. "
            "Add --quantize.scheme int8, say; prune.target is what prunes to a latency."
        )
    if mistakes := list(engine_mistakes(run.recipe.quantize.assignment, [deadline.engine])):
        raise RecipeError("\n".join(mistakes).replace("export.targets", "engine"))
    if package := missing_package(deadline.engine):
        raise RecipeError(f"engine: expected {package} to be installed for {deadline.engine}, got none. Install it.")


def read_sensitivity(run: RunDirectory) -> Sensitivity | None:
    """Return what a run directory holds of a measurement, finished or not.

    Raises:
        RunError: when the file is another one.
    """
    return run.read_measurement(_NAME, lambda *, measured_on=None, **saved: Sensitivity(**saved))


def _measure(run: RunDirectory, stage: str, ratios: Sequence[float]) -> Sensitivity:
    recipe, pruning = run.recipe, run.recipe.prune or StructuredPruning()
    criterion = pruning.wishes.criterion
    loader, num_batches = validation(run)
    network, device = run.network(stage)[0], device_of(run)
    first = next(iter(loader))
    inputs = [tensor[:2].to(device) for tensor in read_batch(first).inputs]
    anatomy = study(network.to(device), inputs, ignore=pruning.ignore, heads=pruning.heads)
    if not anatomy.groups:
        raise EditError(
            f"sensitivity: expected layers that can be pruned, got none in {type(network).__name__}. "
            "Shorten prune.ignore, or choose another student."
        )
    measured_on = {
        "weights": fingerprint_module(network),
        "data": f"{num_batches} batches, the first {fingerprint_tensors(*first)}, {_text(run, 'data', 'task')}",
        "criterion": criterion,
        "heads": pruning.heads,
        "layers": f"all but {', '.join(pruning.ignore)}" if pruning.ignore else "all",
    }
    curves = _found(run, measured_on)
    start = next(iter(anatomy.groups))
    found = {(name, round(ratio * anatomy.widths[name])) for name, points in curves.items() for ratio, _ in points}
    asked = {(name, num_silent(width, ratio)) for name, width in anatomy.widths.items() for ratio in ratios}
    num_points = 1 + sum(num > 0 for _, num in found | asked)
    saved = {
        "stage": stage,
        "criterion": criterion,
        "metric": recipe.task.metric,
        "measured_on": measured_on,
        "widths": anatomy.widths,
        "num_points": num_points,
    }
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=run.console, transient=True) as progress:
        bar = progress.add_task("", total=num_points, completed=bool(found) + sum(num > 0 for _, num in found))

        def on_point(name: str, ratio: float, values: dict[str, float]) -> None:
            nonlocal curves
            begun = curves.get(name, [curves[start][0]] if curves else [])
            curves = {**curves, name: sorted([*begun, [ratio, values]], key=itemgetter(0))}
            run.write_json(_NAME, {**saved, "curves": curves})
            progress.update(bar, advance=1, description=f"{name}, {ratio:.0%} silent")

        try:
            measure_sensitivity(
                anatomy,
                _scores(run, anatomy, criterion, islice(loader, num_batches), device),
                lambda changed: judge(run, changed, islice(loader, num_batches), device),
                ratios=ratios,
                done=curves,
                on_point=on_point,
            )
        except KeyboardInterrupt:
            num_done = int(progress.tasks[bar].completed)
            run.console.print(f"{num_done} of {num_points} points are kept in {run.json_file(_NAME)}", soft_wrap=True)
            raise
    result = read_sensitivity(run)
    assert result is not None
    return result


def _found(run: RunDirectory, measured_on: Mapping[str, str]) -> dict[str, list[list[Any]]]:
    """Return the points of an earlier measurement of the same network on the same data."""
    try:
        earlier = read_sensitivity(run)
    except RunError:
        run.console.print(
            f"{run.json_file(_NAME)}: expected an earlier measurement, got another file. It is measured anew."
        )
        return {}
    if earlier is None:
        return {}
    before = run.read_json(_NAME)["measured_on"]
    changed = [name for name, value in measured_on.items() if before.get(name) != value]
    if changed:
        run.console.print(
            f"{run.json_file(_NAME)}: expected a measurement with the same {' and '.join(changed)}, got one with "
            "others. It is measured anew.",
            soft_wrap=True,
        )
        return {}
    return earlier.curves


def _scores(
    run: RunDirectory, anatomy: Anatomy, criterion: str, batches: Iterable[Any], device: torch.device
) -> dict[str, Tensor]:
    """Return the scores of all units; what a criterion needs besides weights comes from the validation split."""
    if CRITERIA[criterion].needs == "activations":
        return score_groups(
            anatomy,
            criterion,
            activations=measure_activations(anatomy, [tuple(tensor.to(device) for tensor in run.held_out)]),
        )
    gradients = Gradients()
    if CRITERIA[criterion].needs == "gradients":
        for batch in batches:
            given = read_batch(move_data_to_device(batch, device))
            anatomy.network.zero_grad()
            run.recipe.task.loss(anatomy.network(*given.inputs, **given.named), given.targets).backward()
            gradients.update(anatomy.network)
        anatomy.network.zero_grad()
    return score_groups(anatomy, criterion, gradients=gradients)


def _text(run: RunDirectory, *keys: str) -> str:
    """Return sections of the recipe as text; a recipe built from objects has none."""
    config = run.recipe.config or {}
    return json.dumps({key: config.get(key) for key in keys}, sort_keys=True, default=str)
