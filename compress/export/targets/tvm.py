"""A library compiled by Apache TVM (Relax) for the CPU it is built on, by way of ONNX."""

from __future__ import annotations

import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from compress.errors import CompressError, MissingPackageError
from compress.export.onnx.translate import translate
from compress.export.products import RECURRENT
from compress.export.targets import Census, ExportSkippedError
from compress.export.tvm_tuning import with_tuned_single
from compress.measure.machine import describe_machine
from compress.runtime.engines.tvm import SINGLE
from compress.runtime.requirements import native_requirements

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["FILE", "build", "requires"]

FILE = "model.tvm.so"

_MATRIX = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def build(program: ExportedProgram, path: Path, *, trials: int = 0) -> Census:
    """Compile the program; products of quantised values are computed in floats, and counted as that.

    Recurrent layers, which TVM does not take from ONNX, are unrolled.

    Args:
        program: What to compile.
        path: Of the library.
        trials: Schedules that MetaSchedule measures here for a batch of one; none without it, which is quick.

    Raises:
        ExportSkippedError: when there is no C++ compiler to link with, or TVM does not take an operator.
        MissingPackageError: when apache-tvm, onnx or onnxscript is not installed.
    """
    try:
        import tvm
        from tvm.relax.frontend.onnx import from_onnx
    except ImportError as error:
        raise MissingPackageError("apache-tvm", "tvm") from error
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise ExportSkippedError("tvm: expected a C++ compiler, got none. Install one, e.g. apt-get install g++.")
    if any(node.target in RECURRENT for node in program.graph.nodes):
        with torch.no_grad():
            program = program.run_decompositions()
    model = translate(program, target="tvm")
    processor = tvm.target.codegen.llvm_get_system_cpu()
    try:
        module = from_onnx(model)
        target = tvm.target.Target({"kind": "llvm", "mcpu": processor, "num-cores": int(describe_machine()["cores"])})
        if trials:
            module = with_tuned_single(module, from_onnx(model, shape_dict=_of_one(model)), target, trials, SINGLE)
        executable = tvm.compile(module, target=target)
    except CompressError:
        raise
    except Exception as error:  # each operator has its own way to say that it is not supported
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ExportSkippedError(f"tvm: expected a program that TVM compiles, got: {reason}") from error
    executable.export_library(str(path))
    counts = Counter(node.op_type for node in model.graph.node if node.op_type in _MATRIX)
    return Census(0, counts.total(), dict(counts), 0)


def _of_one(model: ModelProto) -> dict[str, list[int]]:
    shapes = {entry.name: [size.dim_value for size in entry.type.tensor_type.shape.dim] for entry in model.graph.input}
    if any(0 in shape[1:] for shape in shapes.values()):
        raise ExportSkippedError("tvm: expected nothing but the batch to vary, to tune, got lengths. Leave trials out.")
    return {name: [1, *shape[1:]] for name, shape in shapes.items()}


def requires() -> dict[str, Any]:
    """Return what a machine needs to run code compiled on this one; TVM's own library calls no torch."""
    needs = native_requirements()
    del needs["torch"]
    return needs | {"versions": {"apache-tvm": ".".join(metadata.version("apache-tvm").split(".")[:2])}}
