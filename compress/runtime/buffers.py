"""Outputs written where the caller wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ArtifactError
from compress.runtime.manifest import TensorSpec
from compress.runtime.sizes import described

if TYPE_CHECKING:
    from compress.runtime.engines import Engine

__all__ = ["check_buffer", "fill"]


def check_buffer(out: Any, spec: TensorSpec, num: int) -> None:
    """Make sure that a buffer takes the output of a batch.

    Args:
        out: Array or tensor.
        spec: Of the output.
        num: Samples in the batch.

    Raises:
        ArtifactError: when shape or dtype is not the output's, or it cannot be written.
    """
    shape, dtype = tuple(out.shape), str(out.dtype).removeprefix("torch.")
    fits = len(shape) == len(spec.shape) and all(wanted in (None, size) for wanted, size in zip(spec.shape, shape))
    if not fits or shape[0] != num:
        raise ArtifactError(
            f"out: expected shape {described(spec)} with N = {num}, got {shape}. Make one of that shape."
        )
    if dtype != spec.dtype:
        raise ArtifactError(f"out: expected dtype {spec.dtype}, got {dtype}. Make one of that dtype.")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ArtifactError("out: expected memory that can be written, got an array that is read-only. Make a new one.")


def fill(
    engine: Engine,
    inputs: Sequence[Any],
    out: Any,
    spec: TensorSpec,
    call: Callable[[Engine, Sequence[Any]], Any],
) -> None:
    """Run a batch into a buffer: the engine writes there where it can, else its output is copied.

    Args:
        engine: What runs it.
        inputs: Arrays or tensors, one of the artefact's inputs each.
        out: Array or tensor of the inputs' kind that ``check_buffer`` has seen.
        spec: Of the output.
        call: Runs the batch, whatever the engine takes.

    Raises:
        ArtifactError: when a size of the buffer that varies is not the output's.
    """
    into = getattr(engine, "into", None)
    memory = [_memory(value) for value in (*inputs, out)]
    if into is not None and None not in spec.shape[1:] and all(array is not None for array in memory):
        into(memory[:-1], memory[-1:])
        return
    found = call(engine, inputs)
    if found.shape != out.shape:
        raise ArtifactError(
            f"out: expected shape {tuple(found.shape)}, got {tuple(out.shape)}. Make one of that shape."
        )
    out[...] = found


def _memory(value: Any) -> np.ndarray | None:
    """Return an array on the same memory, where the host reads it in order."""
    if not isinstance(value, np.ndarray):
        if value.device.type != "cpu":
            return None
        value = value.detach().numpy()
    return value if value.flags.c_contiguous else None
