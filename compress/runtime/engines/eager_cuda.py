"""The portable program on a GPU, operator by operator, in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import MissingPackageError
from compress.runtime.engines.aliases import constants_of
from compress.runtime.engines.eager import fold_constants
from compress.runtime.engines.on_cuda import OnCUDA

if TYPE_CHECKING:
    from torch.fx import GraphModule

__all__ = ["PACKAGES", "make", "mixes_samples", "put_channels_last", "reshape_views"]

PACKAGES = ("torch",)
RUNS_CODE = True
DEVICE = "cuda"

_CONVOLUTIONS = (["conv2d"], ["convolution"])
_REDUCTIONS = [[name] for name in ("amax", "amin", "aminmax", "max", "mean", "min", "prod", "std", "sum", "var")]


def make(path: Path, num_threads: int | None) -> OnCUDA:
    """Load the program onto the current GPU. Loading unpickles: only from a trusted source."""
    try:
        import torch
        from torch.export.passes import move_to_device_pass
    except ImportError as error:
        raise MissingPackageError("torch") from error
    torch.cuda.init()
    program = move_to_device_pass(torch.export.load(path), "cuda")
    module = put_channels_last(fold_constants(program.module(check_guards=False)))

    def run(inputs: list[Any]) -> list[Any]:
        outputs = module(*inputs)
        return [outputs] if torch.is_tensor(outputs) else list(outputs)

    return OnCUDA(run, fills=not mixes_samples(module), constants=constants_of(module))


def put_channels_last(graph_module: GraphModule) -> GraphModule:
    """Lay out the weights of convolutions in half precision with channels last, as tensor cores take them.

    What a convolution gives then lies so as well, and views of it are taken as reshapes, which copy where they must.

    Args:
        graph_module: From an exported program; changed in place.

    Returns:
        The same module.
    """
    import torch

    turned = 0
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or str(node.target).split(".")[1:2] not in _CONVOLUTIONS:
            continue
        if node.args[1].op != "get_attr":
            continue
        holder, _, name = str(node.args[1].target).rpartition(".")
        weight = getattr(graph_module.get_submodule(holder), name)
        if weight.dim() == 4 and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.to(memory_format=torch.channels_last)
            turned += 1
    if turned:
        reshape_views(graph_module)
    return graph_module


def reshape_views(graph_module: GraphModule) -> None:
    """Let a program copy where values are no longer laid out as when it was captured, in place."""
    import torch

    for node in graph_module.graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    graph_module.recompile()


def mixes_samples(graph_module: GraphModule) -> bool:
    """Say whether a reduction may take in several samples, as the range of a whole batch does.

    Args:
        graph_module: Of ATen operators; a reduction without dimensions, or over the first, counts.
    """
    from torch.fx import Node

    for node in graph_module.graph.nodes:
        if node.op != "call_function" or str(node.target).split(".")[1:2] not in _REDUCTIONS:
            continue
        dimensions = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
        dimensions = dimensions if isinstance(dimensions, Sequence) else (dimensions,)
        value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
        if value is None:  # a weight: it has no samples
            continue
        rank = value.dim()
        if not dimensions or any(dimension is None or dimension in (0, -rank) for dimension in dimensions):
            return True
    return False
