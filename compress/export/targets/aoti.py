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
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from compress.export.graph import widen_single_channels
from compress.export.targets import Census, ExportSkippedError
from compress.runtime.requirements import native_requirements

__all__ = ["FILE", "build", "census", "requires"]

FILE = "model.aoti.pt2"

_INT8 = re.compile(r"aoti_torch_cpu_\w*(?:qconv|qlinear)\w*")
_FLOAT = re.compile(r"aoti_torch_cpu_\w*(?:convolution|mkldnn_\w*linear|addmm|bmm|_mm_|mm_out|baddbmm)\w*")


def build(program: ExportedProgram, path: Path) -> None:
    """Compile the program into one file, without debug information.

    Raises:
        ExportSkippedError: when there is no C++ compiler.
    """
    _check_compiler()
    _register_weight_packing()
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            widen_single_channels(program), package_path=str(path), inductor_configs={"freezing": True}
        )
    _strip(path)


def census(path: Path) -> Census:
    """Count the kernels that the generated code calls."""
    calls: Counter[str] = Counter()
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".cpp"):
                code = archive.read(name).decode()
                calls.update(_INT8.findall(code))
                calls.update(_FLOAT.findall(code))
                # Matrix products from Inductor's own templates carry their data types in the micro-kernel's name.
                calls.update(re.findall(r"^void (cpp_\w*(?:int8|bf16|fp32)?_?gemm\w*)\(", code, re.MULTILINE))
    int8 = sum(count for name, count in calls.items() if _INT8.fullmatch(name) or "int8" in name)
    return Census(int8, sum(calls.values()) - int8, dict(calls))


def requires() -> dict[str, Any]:
    """Return what a machine needs to run code compiled on this one."""
    return native_requirements()


def _check_compiler() -> None:
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


def _strip(path: Path) -> None:
    """Take symbols out of the shared libraries: they are two thirds of a small package."""
    tool = shutil.which("strip")
    if tool is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        slim = Path(folder) / path.name
        library = Path(folder) / "library.so"
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(slim, "w", zipfile.ZIP_STORED) as target:
            for entry in source.infolist():
                content = source.read(entry)
                if entry.filename.endswith(".so"):
                    library.write_bytes(content)
                    subprocess.run([tool, "--strip-unneeded", str(library)], check=True, capture_output=True)
                    content = library.read_bytes()
                target.writestr(entry, content)
        shutil.copyfile(slim, path)
