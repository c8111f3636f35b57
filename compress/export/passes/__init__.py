"""Cleaning a program before engines lower it: less to store, to compile and to run, and the same numbers.

Each file holds one pass: a function that rewrites a graph module without in-place operators and returns how many places
it changed. ``clean_up`` applies them all to a copy of a program and counts what went.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from compress.export.graph import largest_batch, loosen_views, weight_bytes
from compress.export.passes.activations import fuse_activations
from compress.export.passes.constants import fold_constants
from compress.export.passes.duplicates import merge_duplicates
from compress.export.passes.identities import drop_identities
from compress.export.passes.norms import fold_norms
from compress.export.passes.unused import drop_unused
from compress.measure import macs
from compress.surgery.capture import Captured, export_program
from compress.surgery.lengths import LARGEST_BATCH, lengths_of
from compress.surgery.recurrent import kept_whole

__all__ = [
    "PASSES",
    "Cleanup",
    "GraphSize",
    "clean_up",
    "drop_identities",
    "drop_unused",
    "fold_constants",
    "fold_norms",
    "fuse_activations",
    "graph_size",
    "merge_duplicates",
]

# In an order in which each finds what those before it have left.
PASSES: dict[str, Callable[[GraphModule], int]] = {
    "drop_identities": drop_identities,
    "fold_norms": fold_norms,
    "fuse_activations": fuse_activations,
    "fold_constants": fold_constants,
    "merge_duplicates": merge_duplicates,
    "drop_unused": drop_unused,
}


@dataclass(frozen=True)
class GraphSize:
    """How large a program is.

    Args:
        nodes: Operators of its graph.
        bytes: Of its weights and constants, in memory; those that share it count once.
        macs: Multiply-accumulates of one sample, of typical sizes where these vary.
    """

    nodes: int
    bytes: int
    macs: int


@dataclass(frozen=True)
class Cleanup:
    """What cleaning has done.

    Args:
        before: The program as it came.
        after: The program as it is lowered.
        changes: Places that each pass changed, where it changed any.
    """

    before: GraphSize
    after: GraphSize
    changes: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-safe data."""
        return asdict(self)


def clean_up(program: ExportedProgram) -> tuple[ExportedProgram, Cleanup]:
    """Apply every pass.

    Args:
        program: Captured in eval mode with a dynamic batch dimension; left as it is.

    Returns:
        A program with the same inputs and, up to rounding, the same outputs; the very same one when there is nothing to
        do. And what was done.

    Raises:
        CaptureError: when what the passes leave cannot be captured again.
    """
    before = graph_size(program)
    graph_module = _functional(program).module(check_guards=False)
    loosen_views(graph_module)
    changes = {name: apply(graph_module) for name, apply in PASSES.items()}
    changes = {name: count for name, count in changes.items() if count}
    if not changes:
        return program, Cleanup(before, before)
    graph_module.graph.lint()
    graph_module.recompile()
    args, _ = program.example_inputs
    most = largest_batch(program) or LARGEST_BATCH
    cleaned = export_program(graph_module, args, lengths=lengths_of(program), largest_batch=most)
    return cleaned, Cleanup(before, graph_size(cleaned), changes)


def graph_size(program: ExportedProgram) -> GraphSize:
    """Measure a program.

    Example:
        >>> graph_size(export_program(torch.nn.Linear(3, 2), [torch.ones(2, 3)]))
        GraphSize(nodes=1, bytes=32, macs=6)
    """
    args, _ = program.example_inputs
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, GraphModule)
    loosen_views(graph_module)  # multiply-accumulates are counted on other kernels than those of capture
    return GraphSize(
        nodes=sum(node.op == "call_function" for node in program.graph.nodes),
        bytes=weight_bytes(program),
        macs=macs(Captured(graph_module), [tensor[:1] for tensor in args]),
    )


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Return the program without in-place operators, whose order would matter."""
    with torch.no_grad(), kept_whole(lengths_of(program)):
        return program.run_decompositions({})
