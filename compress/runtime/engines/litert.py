"""LiteRT's interpreter (TensorFlow Lite), one sample at a time: needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from compress.errors import MissingPackageError
from compress.measure.machine import describe_machine

__all__ = ["PACKAGES", "LiteRTEngine", "make", "open_content"]

PACKAGES = ("ai_edge_litert",)
RUNS_CODE = False


class LiteRTEngine:
    """Runs a file on the CPU.

    Args:
        path: The ``.tflite`` file.
        num_threads: Threads of one call; all cores of this process without it.

    Attributes:
        threads: Threads of one call.
    """

    takes = "numpy"

    def __init__(self, path: Path, num_threads: int | None) -> None:
        self.threads = num_threads or int(describe_machine()["cores"])
        self._content = path.read_bytes()  # later threads get what was loaded
        self._interpreters = local()  # an interpreter serves one thread at a time
        self._interpreter()

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of arrays."""
        interpreter, takes, gives = self._interpreter()
        given = [_integers(value, entry) for value, entry in zip(inputs, takes)]
        outputs: list[list[np.ndarray]] = [[] for _ in gives]
        for sample in range(len(given[0])):
            for value, entry in zip(given, takes):
                interpreter.set_tensor(entry["index"], value[sample : sample + 1])
            interpreter.invoke()
            for found, entry in zip(outputs, gives):
                found.append(interpreter.get_tensor(entry["index"]))
        return [_floats(np.concatenate(found), entry) for found, entry in zip(outputs, gives)]

    def _interpreter(self) -> tuple[Any, list[Any], list[Any]]:
        """Return this thread's interpreter, and what it says of its inputs and outputs."""
        own = getattr(self._interpreters, "own", None)
        if own is None:
            interpreter = open_content(self._content, self.threads)
            takes, gives = sorted(interpreter.get_input_details(), key=_place), interpreter.get_output_details()
            own = self._interpreters.own = (interpreter, takes, gives)
        return own


def open_content(content: bytes, num_threads: int, *, delegate: bool = True) -> Any:
    """Return an interpreter.

    Args:
        content: Of a ``.tflite`` file.
        num_threads: Threads of one call.
        delegate: Whether XNNPACK may take over what it can.

    Raises:
        MissingPackageError: when ai-edge-litert is not installed.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as error:
        raise MissingPackageError("ai-edge-litert", "litert") from error
    resolver = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_content=content, num_threads=num_threads, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    return interpreter


def make(path: Path, num_threads: int | None) -> LiteRTEngine:
    """Open the file."""
    return LiteRTEngine(path, num_threads)


def _place(entry: Mapping[str, Any]) -> int:
    """Return which input it is: its name ends in that, the file has its own order."""
    return int(re.findall(r"\d+", entry["name"].partition(":")[0])[-1])


def _integers(value: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    """Return values as a file takes them: where it begins with integers, it leaves it to others to round."""
    if entry["dtype"] is not np.int8:
        return np.ascontiguousarray(value)
    scale, zero_point = entry["quantization"]
    return (np.rint(value * np.float32(1 / scale)) + zero_point).clip(-128, 127).astype(np.int8)


def _floats(value: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] is not np.int8:
        return value
    scale, zero_point = entry["quantization"]
    return (value.astype(np.float32) - zero_point) * np.float32(scale)
