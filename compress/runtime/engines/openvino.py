"""OpenVINO's intermediate representation, a graph and its weights, compiled on loading: needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from compress.errors import MissingPackageError
from compress.measure.machine import describe_machine, has_vnni

__all__ = ["NARROW", "PACKAGES", "OpenVINOEngine", "compile_model", "make"]

PACKAGES = ("openvino",)
RUNS_CODE = False
NARROW = ["compress", "narrow_weights"]
"""Where a graph notes that its int8 weights have 7 bits."""


class OpenVINOEngine:
    """Runs a graph on the CPU.

    Args:
        path: The ``.xml`` file, with its ``.bin`` beside it.
        num_threads: Threads of one call; all cores of this process without it.

    Attributes:
        threads: Threads of one call.
    """

    takes = "numpy"

    def __init__(self, path: Path, num_threads: int | None) -> None:
        self._model = compile_model(path, num_threads)
        self.threads = int(self._model.get_property("INFERENCE_NUM_THREADS"))
        self._requests = local()  # a request serves one thread at a time

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of arrays."""
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self._model.create_infer_request()
        # It reads the memory in the order of the dimensions, whatever the strides.
        outputs = request.infer([np.ascontiguousarray(value) for value in inputs], share_inputs=True)
        return [outputs[index] for index in range(len(outputs))]

    def into(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Write the outputs of a batch of arrays into contiguous arrays."""
        from openvino import Tensor

        request = self._model.create_infer_request()  # the outputs' memory stays with a request
        for index, value in enumerate(outputs):
            request.set_output_tensor(index, Tensor(value, shared_memory=True))
        request.infer(list(inputs), share_inputs=True, share_outputs=True)


def compile_model(path: Path, num_threads: int | None, *, integers: bool | None = None) -> Any:
    """Compile a graph for the CPU, in float32 where it is not quantised.

    Args:
        path: The ``.xml`` file.
        num_threads: Threads of one call; all cores of this process without it.
        integers: Whether integer kernels may be used; by default where this processor has VNNI, or all weights are
            noted to be of 7 bits: else their sums of two products overflow 16 bits and outputs are wrong.

    Raises:
        MissingPackageError: when openvino is not installed.
    """
    try:
        import openvino.passes
    except ImportError as error:
        raise MissingPackageError("openvino", "openvino") from error
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": num_threads or int(describe_machine()["cores"]),
        "INFERENCE_PRECISION_HINT": "f32",  # else it computes in bfloat16 where the processor has it
    }
    core = openvino.Core()
    model = core.read_model(str(path))
    if not (has_vnni() or model.has_rt_info(NARROW) if integers is None else integers):
        # Integer kernels need integer weights: as floats, they are multiplied as floats.
        passes = openvino.passes.Manager()
        passes.register_pass(openvino.passes.ConstantFolding())
        passes.run_passes(model)
    return core.compile_model(model, "CPU", settings)


def make(path: Path, num_threads: int | None) -> OpenVINOEngine:
    """Compile the graph."""
    return OpenVINOEngine(path, num_threads)
