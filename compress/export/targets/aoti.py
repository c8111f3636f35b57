"""A package compiled by AOTInductor for the CPU it is built on.

Int8 kernels appear only when four things hold, and otherwise it runs in fp32 without a word: strict export (the
caller's), the x86 weight-packing pass, freezing, and compilation without grad. The census proves the outcome.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from compress.export.archive import repack
from compress.export.graph import (
    flatten_strided,
    has_narrow_weights,
    rewritten,
    spare_inputs,
    widen_single_channels,
)
from compress.export.targets import Census, ExportSkippedError
from compress.export.targets.aoti_packing import register_packing
from compress.measure.machine import has_vnni
from compress.runtime.requirements import native_requirements

__all__ = ["FILE", "build", "check_compiler", "compile_package", "count_kernels", "requires"]

FILE = "model.aoti.pt2"

_MOST_BYTES = 1_900_000_000

# Calls from the generated wrapper into torch's kernels, and Inductor's own matrix products, whose names carry types.
_INT8 = re.compile(r"\baoti_torch_cpu_\w*(?:qconv|qlinear)\w*(?=\()|^void cpp_\w*int8\w*gemm\w*(?=\()", re.MULTILINE)
_FLOAT = re.compile(
    r"\baoti_torch_(?:cpu|cuda)_(?!\w*(?:qconv|qlinear))\w*(?:convolution|linear|addmm|bmm|_mm_out|rnn|scaled_dot_product)"
    r"\w*(?=\()|\bcall_triton_tem_\w*(?=\()|^void cpp_(?!\w*int8)\w*gemm\w*(?=\()",
    re.MULTILINE,
)
_QUANTIZE = re.compile(r"^\s+cpp_\w*(?<!de)quantize_per_\w+(?=\()", re.MULTILINE)


def build(program: ExportedProgram, path: Path, *, max_autotune: bool = False) -> Census:
    """Compile the program into one file without debug information and sources, and count its kernels.

    Args:
        program: Quantised or not.
        path: Of the file.
        max_autotune: Let Inductor measure several kernels for each matrix product and take the fastest, which makes
            the compilation several times longer.

    Raises:
        ExportSkippedError: when there is no C++ compiler, or this processor computes int8 kernels wrongly.
    """
    check_compiler()
    _register_weight_packing()
    # Else the number of threads of this machine is written into the code.
    settings = {"cpp.dynamic_threads": True, "max_autotune": max_autotune}
    found = compile_package(rewritten(program, _for_inductor), path, settings)
    if found.int8_kernels and not (has_vnni() or has_narrow_weights(program)):
        path.unlink()
        raise ExportSkippedError(
            "aoti: expected a processor with VNNI for int8, got one without: sums of products overflow there, and "
            "convolutions differ from call to call. Use the scheme int8_reduced, whose weights have 7 bits, leave the "
            "target out, or keep the network in floats."
        )
    return found


def compile_package(program: ExportedProgram, path: Path, settings: Mapping[str, Any]) -> Census:
    """Compile a program for the device it is on, leave sources and symbols out of the package, and count its kernels.

    What Inductor or its compiler raises goes on as it is: ``build_target`` makes a reason of it.

    Args:
        program: Captured without grad modes inside.
        path: Of the package.
        settings: Of Inductor, beyond those that all packages have.
    """
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={**_settings(), **settings}
        )
    with zipfile.ZipFile(path) as package:
        found = count_kernels(package.read(name).decode() for name in package.namelist() if name.endswith(".cpp"))
    repack(path, _slim)
    return found


def count_kernels(sources: Iterable[str]) -> Census:
    """Count the matrix kernels that generated C++ code calls, and those that turn floats into integers.

    Args:
        sources: The files' text.

    Example:
        >>> found = count_kernels(["aoti_torch_cpu__qlinear_pointwise_tensor(x); aoti_torch_cpu_addmm_out(y);"])
        >>> found.int8_kernels, found.float_kernels
        (1, 1)
    """
    int8, floats, conversions = Counter[str](), Counter[str](), 0
    for code in sources:
        conversions += len(_QUANTIZE.findall(code))
        int8.update(_INT8.findall(code))
        floats.update(_FLOAT.findall(code))
    return Census(int8.total(), floats.total(), {**int8, **floats}, conversions)


def requires() -> dict[str, Any]:
    """Return what a machine needs to run code compiled on this one."""
    return native_requirements()


def _for_inductor(graph_module: GraphModule) -> int:
    return widen_single_channels(graph_module) + spare_inputs(graph_module) + flatten_strided(graph_module)


def _settings() -> dict[str, Any]:
    settings: dict[str, Any] = {"freezing": True}
    if hasattr(torch._inductor.config.aot_inductor, "enable_line_tables"):
        settings["aot_inductor.enable_line_tables"] = False  # takes compile time and two thirds of a small package
    return settings


def check_compiler() -> None:
    """Make sure that there is a C++ compiler.

    Raises:
        ExportSkippedError: when there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        compiler = os.environ.get("CXX", "g++ or clang++")
        raise ExportSkippedError(
            f"aoti: expected a C++ compiler, got none ({compiler}). Install one, e.g. apt-get install g++."
        ) from None


@cache
def _register_weight_packing() -> None:
    from torchao.quantization.pt2e.inductor_passes.x86 import _register_quantization_weight_pack_pass

    _register_quantization_weight_pack_pass()
    register_packing()


def _slim(name: str, content: bytes) -> bytes:
    """Empty the sources, whose names torch 2.11 finds other files by, and strip the libraries of symbols."""
    if name.endswith(".cpp"):
        return b""
    tool = shutil.which("strip")
    # Weights beyond this are behind the library, where tools that rewrite it do not look.
    if tool is None or not name.endswith(".so") or len(content) > _MOST_BYTES:
        return content
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        library.write_bytes(content)
        subprocess.run([tool, "--strip-unneeded", str(library)], check=True, capture_output=True)
        return library.read_bytes()
