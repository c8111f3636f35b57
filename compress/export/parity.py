"""Does a built engine say what the trained module says? Asked through the very runtime that will serve it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from compress.errors import ExportError, ExportSkippedError, first_line
from compress.export.graph import dtype_name
from compress.export.outputs import Outputs, first_rows, named, structure_of
from compress.measure.agreement import Agreement, agreement
from compress.runtime.engines import Engine
from compress.runtime.manifest import TensorSpec
from compress.runtime.outputs import arranger
from compress.runtime.sizes import described, wrong_size
from compress.runtime.values import class_output
from compress.surgery.lengths import Length

__all__ = ["Parity", "Sample", "check_inputs", "check_parity", "compare", "other_sizes", "reference_outputs"]

_BATCH = 63  # divides no usual N: the last batch is smaller, so a fixed batch size cannot go unnoticed
_NUM_SINGLES = 16


@dataclass(frozen=True)
class Sample:
    """Inputs and the outputs that must come out.

    Args:
        inputs: Shape (N, ...) each.
        wanted: Shape (N, ...) each.
    """

    inputs: Sequence[Tensor]
    wanted: Outputs


@dataclass(frozen=True)
class Parity:
    """Agreement of an engine with the trained module.

    Of several outputs, distances are those of the worst, and the top-1 agreement is that of the output by which classes
    are told: the one called ``logits``, else the first.

    Args:
        batches: On all held-out inputs, in batches.
        singles: On the first few, one by one: compilers treat a batch of one differently.
        others: On inputs of other sizes, by what these are.
        outputs: The same of each output by its name, where there are several.
    """

    batches: Agreement
    singles: Agreement
    others: Mapping[str, Agreement] = field(default_factory=dict)
    outputs: Mapping[str, Parity] = field(default_factory=dict)


def check_inputs(specs: Sequence[TensorSpec], inputs: Sequence[Tensor]) -> None:
    """Make sure that inputs are such as a program takes.

    Args:
        specs: Of the program's inputs.
        inputs: Shape (N, ...) each.

    Raises:
        ExportError: when number, shape, dtype or a size is another.
    """
    if len(inputs) != len(specs):
        raise ExportError(f"inputs: expected {len(specs)}, got {len(inputs)}. Give one for each.")
    for spec, value in zip(specs, inputs):
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        fits = len(shape) == len(spec.shape) and all(w in (None, s) for w, s in zip(spec.shape, shape))
        if dtype != spec.dtype or not fits or shape[0] < 2:
            raise ExportError(
                f"{spec.name}: expected at least 2 samples of shape {described(spec)} and dtype {spec.dtype}, "
                f"got shape {shape} and dtype {dtype}. Give inputs as the network takes them."
            )
    reason = wrong_size(specs, [value.shape for value in inputs])
    if reason:
        raise ExportError(reason)


def reference_outputs(reference: Callable[..., Any], held_out: Sequence[Tensor]) -> Outputs:
    """Return the trained module's outputs, shape (N, ...) each.

    Raises:
        ExportError: when it gives anything but a tensor, or a tuple or dict of tensors, with a row for each input, of
            a dtype that numpy has, or there are no inputs.
    """
    if not held_out or not len(held_out[0]):
        raise ExportError("held_out: expected at least one input, got none. Give validation inputs.")
    form: tuple[str | None, list[str]] = (None, [])

    def run(batch: list[Tensor]) -> list[Any]:
        nonlocal form
        given = reference(*batch)
        found = named(given, "reference")
        for name, value in found.items():
            if isinstance(value, Tensor):
                dtype_name(name, value)
            if value.shape[:1] != batch[0].shape[:1]:
                raise ExportError(
                    f"reference: expected a row of {name} for each of {len(batch[0])} inputs, got shape "
                    f"{tuple(value.shape)}. Leave it out of what forward returns."
                )
        form = structure_of(given), list(found)
        return list(found.values())

    with torch.no_grad():
        arrays = _outputs(run, held_out, _BATCH)
    return arranger(*form)(arrays)


def other_sizes(
    reference: Callable[..., Any], held_out: Sequence[Tensor], lengths: Sequence[Length]
) -> dict[str, Sample]:
    """Return the first few inputs at the smallest and the largest sizes that they may have, cut or repeated.

    Args:
        reference: What gives the outputs that must come out.
        held_out: Inputs, shape (N, ...) each.
        lengths: The sizes that may vary; one without a limit is doubled.

    Raises:
        ExportError: when it fails on one of these sizes.
    """
    found = {}
    for text in ("smallest", "largest") if lengths else ():
        inputs = [tensor[:_NUM_SINGLES] for tensor in held_out]
        sizes = []
        for length in lengths:
            for index in length.places(held_out):
                now = inputs[index].shape[length.dimension]
                size = length.smallest if text == "smallest" else length.largest or 2 * now
                inputs[index] = _resized(inputs[index], length.dimension, size)
            sizes.append(f"{size} in dimension {length.dimension}")
        text = ", ".join(sizes)
        try:
            found[text] = Sample(inputs, reference_outputs(reference, inputs))
        except (IndexError, RuntimeError) as error:  # of an operator
            raise ExportError(
                f"lengths: expected a network that takes sizes of {text}, got {first_line(error)}. Name the sizes that "
                "it takes."
            ) from error
    return found


def check_parity(
    engine: Engine, wanted: Outputs, held_out: Sequence[Tensor], others: Mapping[str, Sample] | None = None
) -> Parity:
    """Run an engine on held-out inputs and compare.

    Args:
        engine: Loaded from the file that will be served.
        wanted: The trained module's outputs, shape (N, ...) each.
        held_out: The inputs, shape (N, ...) each.
        others: Inputs of other sizes, from ``other_sizes``.

    Raises:
        ExportError: when it gives outputs of another number or shape.
        ExportSkippedError: when it does not run, or gives another dtype.
    """
    few = Sample([tensor[:_NUM_SINGLES] for tensor in held_out], first_rows(wanted, _NUM_SINGLES))
    batches, singles = _distances(engine, Sample(held_out, wanted), _BATCH), _distances(engine, few, 1)
    sizes = {text: _distances(engine, sample, _BATCH, f", {text}") for text, sample in (others or {}).items()}
    each = {
        name: Parity(batches[name], singles[name], {text: found[name] for text, found in sizes.items()})
        for name in batches
    }
    if len(each) == 1:
        return next(iter(each.values()))
    return Parity(_worst(batches), _worst(singles), {text: _worst(found) for text, found in sizes.items()}, each)


def _worst(found: Mapping[str, Agreement]) -> Agreement:
    each = list(found.values())
    return Agreement(
        max_abs_error=max(one.max_abs_error for one in each),
        relative_error=max(one.relative_error for one in each),
        top1_agreement=each[class_output(list(found))].top1_agreement,
        num_samples=each[0].num_samples,
    )


def _distances(engine: Engine, sample: Sample, batch: int, where: str = "") -> dict[str, Agreement]:
    wanted, name = named(sample.wanted, "reference"), type(engine).__name__
    inputs = sample.inputs if engine.takes != "numpy" else [tensor.numpy() for tensor in sample.inputs]
    try:
        outputs = _outputs(engine, inputs, batch)
    except Exception as error:  # an engine's library raises anything
        raise ExportSkippedError(
            f"{name}: expected a run at batch size {batch}{where}, got: {first_line(error)}. Leave the target out."
        ) from error
    if len(outputs) != len(wanted):
        raise ExportError(
            f"{name}: expected {len(wanted)} outputs ({', '.join(wanted)}), got {len(outputs)}. Leave the target out."
        )
    for value, found in zip(wanted.values(), outputs):
        if found.shape != value.shape:
            raise ExportError(
                f"{name}: expected outputs of shape {value.shape} at batch size {batch}{where}, got {found.shape}. "
                "Leave the target out."
            )
        if found.dtype != value.dtype:
            raise ExportSkippedError(
                f"{name}: expected outputs of dtype {value.dtype}, got {found.dtype}. Leave the target out."
            )
    return {key: agreement(value, found) for (key, value), found in zip(wanted.items(), outputs)}


def _resized(tensor: Tensor, dimension: int, size: int) -> Tensor:
    repeats = [1] * tensor.dim()
    repeats[dimension] = -(-size // tensor.shape[dimension])
    return tensor.repeat(repeats).narrow(dimension, 0, size).contiguous()


def compare(program: ExportedProgram, wanted: Outputs, held_out: Sequence[Tensor]) -> Agreement:
    """Run a program as it is and compare: what an engine adds is the difference between this and its own distance."""
    module = program.module(check_guards=False)
    with torch.no_grad():
        outputs = _outputs(lambda batch: list(named(module(*batch), "program").values()), held_out, _BATCH)
    each = zip(named(wanted, "reference").items(), outputs)
    return _worst({name: agreement(value, found) for (name, value), found in each})


def _outputs(run: Callable[[list[Any]], Sequence[Any]], inputs: Sequence[Any], batch: int) -> list[np.ndarray]:
    """Return the outputs of a run in batches, shape (N, ...) each."""
    parts = [
        [np.asarray(value) for value in run([value[start : start + batch] for value in inputs])]
        for start in range(0, len(inputs[0]), batch)
    ]
    return [np.concatenate(each) for each in zip(*parts, strict=True)]
