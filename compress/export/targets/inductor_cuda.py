"""What Inductor compiles for the GPU of this machine, called from Python, in float32.

The same kernels as those of AOTInductor, without C++ around them, which torch cannot load everywhere (``aoti_cuda``).
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from compress.errors import ExportSkippedError
from compress.export.for_gpu import for_gpu
from compress.export.targets import Census
from compress.runtime.engines.eager_cuda import reshape_views
from compress.runtime.requirements import cuda_requirements

__all__ = ["FILE", "build", "build_in", "compile_artifact", "requires"]

FILE = "model.inductor_cuda.pt"

# Its kernels count in 32 bits where they can at the batch of the capture, and what would guard that is not kept.
_LARGEST_TENSOR = 2**30

# Calls from the generated code into torch's kernels, and Inductor's own matrix products.
_KERNELS = re.compile(
    r"extern_kernels\.\w*(?:convolution|addmm|bmm|mm)\w*(?=\()|"
    r"torch\.ops\.aten\.\w*(?:convolution|scaled_dot_product|cudnn_rnn)\w*(?=\.\w+\()|"
    r"(?:\btriton_tem_\w+(?=\.run\())"
)


def build_in(dtype: torch.dtype, program: ExportedProgram, path: Path, *, max_autotune: bool = False) -> Census:
    """Compile the program in a precision; its inputs and outputs stay in float32.

    Args:
        dtype: What it computes in.
        program: Not quantised.
        path: Of the file.
        max_autotune: Let Inductor measure several kernels for each matrix product and convolution, which takes minutes.

    Raises:
        ExportSkippedError: when there is no GPU, Inductor cannot keep what it has compiled, the program is quantised,
            or its samples see each other, since small batches are filled up when served.
    """
    program, _ = for_gpu("inductor_cuda", program, dtype)
    return compile_artifact(program, path, max_autotune=max_autotune)


build = partial(build_in, torch.float32)


def compile_artifact(program: ExportedProgram, path: Path, *, max_autotune: bool = False) -> Census:
    """Compile a program for the device it is on, and write what came out and its weights into one file.

    Args:
        program: On one device, captured with the batch that kernels are chosen for.
        path: Of the file.
        max_autotune: As for ``build_in``.

    Raises:
        ExportSkippedError: when Inductor cannot keep what it has compiled.
    """
    program = program.run_decompositions({})
    graph_module = program.graph_module
    held = {**program.state_dict, **program.constants}
    kept = [spec for spec in program.graph_signature.input_specs if spec.kind != InputKind.USER_INPUT]
    values = [held[str(spec.target)].detach() for spec in kept]
    places = graph_module.graph.find_nodes(op="placeholder")
    examples = [node.meta["val"] for node in places]
    for index, node in enumerate(places[: len(values)]):
        if values[index].dim() == 4 and any("conv" in str(user.target) for user in node.users):
            # As kernels take them; otherwise they would be turned at every call.
            values[index] = values[index].contiguous(memory_format=torch.channels_last)
            examples[index] = examples[index].contiguous(memory_format=torch.channels_last)
    reshape_views(graph_module)
    for node in graph_module.graph.output_node().all_input_nodes:
        node.meta["example_value"] = node.meta["val"]  # where it looks for what varies: else every size would
    # Convolutions run in channels-last; with a dynamic batch Inductor does not do so of itself.
    settings = {"force_layout_optimization": True, "max_autotune": max_autotune}
    most = _LARGEST_TENSOR // max(_sizes(graph_module)) * _batch(places[len(values)])
    # Kernels for matrix products and convolutions would have TF32 written into them.
    exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.no_grad(), exactly, tempfile.TemporaryDirectory() as folder:
        compiled = torch._inductor.standalone_compile(
            graph_module, examples, dynamic_shapes="from_graph", options={"config_patches": settings}
        )
        try:
            compiled.save(path=f"{folder}/sources", format="unpacked")
            compiled.save(path=f"{folder}/compiled", format="binary")
        except (AssertionError, RuntimeError) as error:  # some operator that its cache does not take
            raise ExportSkippedError(
                f"inductor_cuda: expected code that torch {torch.__version__} can keep in a file, got: {error}. Leave "
                "the target out."
            ) from error
        found = Counter[str]()
        for source in Path(folder, "sources").rglob("*.py"):
            found.update(_KERNELS.findall(source.read_text()))
        content = bytearray(Path(folder, "compiled").read_bytes())
    values = [value.cpu() for value in values]
    compiled_bytes = torch.frombuffer(content, dtype=torch.uint8)
    torch.save({"compiled": compiled_bytes, "values": values, "largest_batch": max(1, most)}, path)
    return Census(0, found.total(), dict(found))


def _sizes(graph_module: GraphModule) -> list[int]:
    """Return how many numbers each tensor has at the batch of the capture."""
    found = [node.meta.get("val") for node in graph_module.graph.nodes]
    return [math.prod(_number(size) for size in value.shape) for value in found if isinstance(value, torch.Tensor)]


def _batch(node: Node) -> int:
    return _number(node.meta["val"].shape[0])


def _number(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def requires() -> dict[str, Any]:
    """Return what a machine needs: the same kind of GPU, and the very same torch."""
    return {**cuda_requirements(), "build": version("torch")}
