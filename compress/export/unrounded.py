"""The portable program without its rounding: what the network would cost in float32, operator by operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from compress.export.arithmetic import recognise
from compress.runtime.engines.eager import EagerEngine

__all__ = ["UnroundedEngine", "drop_rounding"]


class UnroundedEngine(EagerEngine):
    """Runs a portable program in floats throughout; weights are those that integers stand for.

    Args:
        path: A ``.pt2`` file of the target ``eager``. Loading unpickles: only from a trusted source.

    Attributes:
        is_float: Whether something was rounded, and nothing is any more; steps found at run time stay.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        dropped = drop_rounding(self._program)
        left = any(node.target is torch.ops.aten.round.default for node in self._program.graph.nodes)
        self.is_float = dropped > 0 and not left


def drop_rounding(graph_module: GraphModule) -> int:
    """Let values pass that a program of plain operators turns to integers and back, in place.

    Args:
        graph_module: With constants folded.

    Returns:
        How many there were.
    """
    recognise(graph_module)
    operators = torch.ops.quantized_decomposed
    dropped = 0
    for node in graph_module.graph.nodes:
        quantized: Any = node.args[0] if node.target is operators.dequantize_per_tensor.default else None
        if _is(quantized, operators.quantize_per_tensor.default):
            node.replace_all_uses_with(quantized.args[0])
            dropped += 1
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return dropped


def _is(value: Any, operator: Any) -> bool:
    return isinstance(value, Node) and value.target is operator
