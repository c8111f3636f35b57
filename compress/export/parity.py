"""Does a built engine say what the trained module says? Asked through the very runtime that will serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from compress.errors import ExportError
from compress.measure.agreement import Agreement, agreement
from compress.runtime.engines import Engine

__all__ = ["Parity", "check_parity", "compare", "reference_outputs"]

_BATCH = 63  # divides no usual N: the last batch is smaller, so a fixed batch size cannot go unnoticed
_NUM_SINGLES = 16


class Parity:
    """Agreement of an engine with the trained module.

    Attributes:
        batches: On all held-out inputs, in batches.
        singles: On the first few, one by one: compilers treat a batch of one differently.
    """

    def __init__(self, batches: Agreement, singles: Agreement) -> None:
        self.batches = batches
        self.singles = singles


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


def check_parity(engine: Engine, wanted: np.ndarray, held_out: Sequence[Tensor]) -> Parity:
    """Run an engine on held-out inputs and compare.

    Args:
        engine: Loaded from the file that will be served.
        wanted: The trained module's outputs, shape (N, ...).
        held_out: The inputs, shape (N, ...) each.

    Raises:
        ExportError: when the engine does not run, or gives outputs of another shape.
    """
    inputs = held_out if engine.takes != "numpy" else [tensor.numpy() for tensor in held_out]
    found = []
    for num, batch in ((len(wanted), _BATCH), (_NUM_SINGLES, 1)):
        try:
            outputs = _outputs(engine, [tensor[:num] for tensor in inputs], batch)
        except Exception as error:  # an engine's library raises anything
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExportError(
                f"{type(engine).__name__}: expected a run at batch size {batch}, got: {reason}. Leave the target out."
            ) from error
        if outputs is None or outputs.shape != wanted[:num].shape:
            raise ExportError(
                f"{type(engine).__name__}: expected outputs of shape {wanted[:num].shape} at batch size {batch}, got "
                f"{'another number' if outputs is None else outputs.shape}. Leave the target out."
            )
        found.append(agreement(wanted[:num], outputs))
    return Parity(*found)


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
