"""A program made ready for a compiler that writes kernels for the GPU of this machine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram

from compress.errors import ExportSkippedError
from compress.export.graph import drop_assertions
from compress.export.precision import in_precision
from compress.measure.machine import has_cuda
from compress.runtime.engines.eager_cuda import mixes_samples
from compress.surgery.capture import export_program

__all__ = ["for_gpu"]

_TYPICAL_BATCH = 32  # kernels fit any batch; this is what they are chosen for


def for_gpu(target: str, program: ExportedProgram, dtype: torch.dtype) -> tuple[ExportedProgram, list[Tensor]]:
    """Return a program on the GPU that computes in a precision, and inputs on the CPU of the size it is tuned for.

    Args:
        target: Who asks, for messages.
        program: Not quantised.
        dtype: What it computes in; its inputs and outputs stay in float32.

    Raises:
        ExportSkippedError: when there is no GPU, the program is quantised, or its samples see each other, since small
            batches are filled up when served.
    """
    program = in_precision(program, dtype)
    if mixes_samples(program.graph_module):
        raise ExportSkippedError(
            f"{target}: expected a network whose samples do not see each other, got a reduction over the batch. "
            "Leave the target out."
        )
    if not (has_cuda() and torch.cuda.is_available()):
        raise ExportSkippedError(
            f"{target}: expected a GPU that CUDA sees, got none. Export on a machine with one, or leave the target out."
        )
    from torch.export.passes import move_to_device_pass

    args, _ = program.example_inputs
    few = [tensor[:1].expand(_TYPICAL_BATCH, *tensor.shape[1:]).contiguous() for tensor in args]
    program = export_program(program.module(check_guards=False), few)
    drop_assertions(program)
    return move_to_device_pass(program, "cuda"), few
