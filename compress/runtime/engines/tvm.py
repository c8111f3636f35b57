"""A library compiled by Apache TVM for one kind of processor: needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from compress.errors import MissingPackageError
from compress.measure.machine import describe_machine

__all__ = ["PACKAGES", "SINGLE", "TVMEngine", "make"]

PACKAGES = ("tvm",)
RUNS_CODE = True
SINGLE = "single"
"""The function for a batch of one, in a library that was tuned."""

_ALL_CORES_ALIKE = 1  # of TVM's affinity modes


class TVMEngine:
    """Runs a compiled library on the CPU.

    Args:
        path: The library. It is native code: only from a trusted source.
        num_threads: Threads of one call, of the whole process; all its cores without it.

    Attributes:
        threads: Threads of one call.
    """

    takes = "numpy"

    def __init__(self, path: Path, num_threads: int | None) -> None:
        import tvm
        from tvm.relax import VirtualMachine

        self.threads = num_threads or int(describe_machine()["cores"])
        tvm.get_global_func("runtime.config_threadpool")(_ALL_CORES_ALIKE, self.threads)
        library, device = tvm.runtime.load_module(str(path)), tvm.cpu()
        self._tensor = tvm.runtime.tensor
        self._start = lambda: VirtualMachine(library, device)
        self._machines = local()  # a virtual machine serves one thread at a time

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of arrays."""
        functions = getattr(self._machines, "functions", None)
        if functions is None:
            functions = self._machines.functions = _functions(self._start())
        function = functions[len(inputs[0]) == 1]
        outputs = function(*[self._tensor(np.ascontiguousarray(value)) for value in inputs])
        return [output.numpy() for output in ([outputs] if hasattr(outputs, "numpy") else outputs)]


def _functions(machine: Any) -> dict[bool, Any]:
    """Return the function for a batch of any size, and that for a batch of one, which may have been tuned."""
    main = machine["main"]
    try:
        return {False: main, True: machine[SINGLE]}
    except AttributeError:  # it was not tuned
        return {False: main, True: main}


def make(path: Path, num_threads: int | None) -> TVMEngine:
    """Load the library."""
    try:
        import tvm  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("apache-tvm", "tvm") from error
    return TVMEngine(path, num_threads)
