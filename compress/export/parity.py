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
from compress.measure.agreement import Agreement, agreement
from compress.runtime.engines import Engine
from compress.runtime.manifest import TensorSpec
from compress.runtime.sizes import described, wrong_size
from compress.surgery.lengths import Length

__all__ = ["Parity", "Sample", "check_inputs", "check_parity", "compare", "other_sizes", "reference_outputs"]

_BATCH = 63  # divides no usual N: the last batch is smaller, so a fixed batch size cannot go unnoticed
_NUM_SINGLES = 16


@dataclass(frozen=True)
class Sample:
    """Inputs and the outputs that must come out.

    Args:
        inputs: Shape (N, ...) each.
        wanted: Shape (N, ...).
    """

    inputs: Sequence[Tensor]
    wanted: np.ndarray


@dataclass(frozen=True)
class Parity:
    """Agreement of an engine with the trained module.

    Args:
        batches: On all held-out inputs, in batches.
        singles: On the first few, one by one: compilers treat a batch of one differently.
        others: On inputs of other sizes, by what these are.
    """

    batches: Agreement
    singles: Agreement
    others: Mapping[str, Agreement] = field(default_factory=dict)


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


def reference_outputs(reference: Callable[..., Any], held_out: Sequence[Tensor]) -> np.ndarray:
    """Return the trained module's outputs, shape (N, ...).

    Raises:
        ExportError: when it gives anything but one tensor with a row for each input, or there are no inputs.
    """
    if not held_out or not len(held_out[0]):
        raise ExportError("held_out: expected at least one input, got none. Give validation inputs.")
    with torch.no_grad():
        wanted = _outputs(lambda batch: [reference(*batch)], held_out, _BATCH)
    if wanted is None:
        raise ExportError("reference: expected one tensor as output, got something else. Return the logits alone.")
    return wanted


def other_sizes(
    reference: Callable[..., Any], held_out: Sequence[Tensor], lengths: Sequence[Length]
) -> dict[str, Sample]:
    """Return the first few inputs at the smallest and the largest sizes that they may have, cut or repeated.

    Args:
        reference: What gives the outputs that must come out.
        held_out: Inputs, shape (N, ...) each.
        lengths: The sizes that may vary; one without a limit is doubled.
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
        found[", ".join(sizes)] = Sample(inputs, reference_outputs(reference, inputs))
    return found


def check_parity(
    engine: Engine, wanted: np.ndarray, held_out: Sequence[Tensor], others: Mapping[str, Sample] | None = None
) -> Parity:
    """Run an engine on held-out inputs and compare.

    Args:
        engine: Loaded from the file that will be served.
        wanted: The trained module's outputs, shape (N, ...).
        held_out: The inputs, shape (N, ...) each.
        others: Inputs of other sizes, from ``other_sizes``.

    Raises:
        ExportError: when it gives outputs of another shape.
        ExportSkippedError: when it does not run.
    """
    few = Sample([tensor[:_NUM_SINGLES] for tensor in held_out], wanted[:_NUM_SINGLES])
    return Parity(
        _distance(engine, Sample(held_out, wanted), _BATCH),
        _distance(engine, few, 1),
        {text: _distance(engine, sample, _BATCH, f", {text}") for text, sample in (others or {}).items()},
    )


def _distance(engine: Engine, sample: Sample, batch: int, where: str = "") -> Agreement:
    inputs = sample.inputs if engine.takes != "numpy" else [tensor.numpy() for tensor in sample.inputs]
    try:
        outputs = _outputs(engine, inputs, batch)
    except Exception as error:  # an engine's library raises anything
        raise ExportSkippedError(
            f"{type(engine).__name__}: expected a run at batch size {batch}{where}, got: {first_line(error)}. "
            "Leave the target out."
        ) from error
    if outputs is None or outputs.shape != sample.wanted.shape:
        raise ExportError(
            f"{type(engine).__name__}: expected outputs of shape {sample.wanted.shape} at batch size {batch}{where}, "
            f"got {'another number' if outputs is None else outputs.shape}. Leave the target out."
        )
    return agreement(sample.wanted, outputs)


def _resized(tensor: Tensor, dimension: int, size: int) -> Tensor:
    repeats = [1] * tensor.dim()
    repeats[dimension] = -(-size // tensor.shape[dimension])
    return tensor.repeat(repeats).narrow(dimension, 0, size).contiguous()


def compare(program: ExportedProgram, wanted: np.ndarray, held_out: Sequence[Tensor]) -> Agreement:
    """Run a program as it is and compare: what an engine adds is the difference between this and its own distance."""
    module = program.module(check_guards=False)
    with torch.no_grad():
        outputs = _outputs(lambda batch: [module(*batch)], held_out, _BATCH)
    assert outputs is not None
    return agreement(wanted, outputs)


def _outputs(run: Callable[[list[Any]], Sequence[Any]], inputs: Sequence[Any], batch: int) -> np.ndarray | None:
    parts = []
    for start in range(0, len(inputs[0]), batch):
        outputs = run([value[start : start + batch] for value in inputs])
        if len(outputs) != 1 or not isinstance(outputs[0], np.ndarray | Tensor):
            return None
        parts.append(np.asarray(outputs[0]))
    return np.concatenate(parts)
