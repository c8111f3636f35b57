"""One call of a program on an engine, to be timed: no artefact, no check."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from compress.export.targets import TARGETS
from compress.measure.threads import torch_threads
from compress.runtime.engines import READS, make_engine

__all__ = ["engine_call", "repeat_samples"]


def engine_call(
    program: ExportedProgram, inputs: Sequence[Tensor], engine: str, *, num_threads: int | None = None
) -> Callable[[], object]:
    """Build a program for an engine and return a call of it.

    Args:
        program: What is built.
        inputs: What it is called with, shape (N, ...) each.
        engine: A key of ``compress.runtime.engines.ENGINES``.
        num_threads: Threads of a call; the engine's default without it. Call torch's engines within
            ``compress.measure.threads.torch_threads``: they take what the process has.

    Raises:
        ExportSkippedError: when the engine cannot be given it.
        MissingPackageError: when the engine's library is not installed.
    """
    builder = import_module(TARGETS[READS.get(engine, engine)])
    with tempfile.TemporaryDirectory() as folder, torch_threads(num_threads):
        path = Path(folder) / builder.FILE
        builder.build(program, path)
        made = make_engine(engine, path, num_threads=num_threads)
    given = [tensor.numpy() for tensor in inputs] if made.takes == "numpy" else list(inputs)
    return lambda: made(given)


def repeat_samples(tensor: Tensor, num: int) -> Tensor:
    """Return a batch of a size, of the samples there are, again and again.

    Example:
        >>> repeat_samples(torch.tensor([[1], [2]]), 3).tolist()
        [[1], [2], [1]]
    """
    return tensor[torch.arange(num) % len(tensor)].contiguous()
