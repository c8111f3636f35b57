"""The portable program, run operator by operator in torch: runs wherever torch does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import MissingPackageError
from compress.runtime.engines.aliases import attribute, constants_of, owned

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

__all__ = ["PACKAGES", "EagerEngine", "fold_constants", "make"]

PACKAGES = ("torch",)
RUNS_CODE = True


class EagerEngine:
    """Runs a program of plain ATen operators.

    Args:
        path: A ``.pt2`` file from ``torch.export.save``. Loading unpickles: only from a trusted source.
    """

    takes = "torch"

    def __init__(self, path: Path) -> None:
        import torch

        self._torch = torch
        self._program = fold_constants(torch.export.load(path).module(check_guards=False))
        self._constants = constants_of(self._program)

    @property
    def threads(self) -> int:
        """Threads of one call."""
        return self._torch.get_num_threads()

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of tensors."""
        with self._torch.no_grad():
            outputs = self._program(*inputs)
            return owned([outputs] if self._torch.is_tensor(outputs) else outputs, inputs, self._constants)


def fold_constants(graph_module: GraphModule) -> GraphModule:
    """Compute once what depends on weights alone: mostly int8 weights back into floats.

    Args:
        graph_module: From an exported program; changed in place. What is drawn is drawn anew at each call.

    Returns:
        The same module.
    """
    import torch

    known: dict[Any, Any] = {}
    graph = graph_module.graph
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "get_attr":
                known[node] = attribute(graph_module, str(node.target))
            elif _is_fixed(node) and all(n in known for n in node.all_input_nodes):
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
    for index, (node, value) in enumerate(known.items()):
        if node.op == "call_function" and torch.is_tensor(value) and any(user not in known for user in node.users):
            name = f"folded_{index}"
            graph_module.register_buffer(name, value.detach())
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(name))
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def make(path: Path, num_threads: int | None) -> EagerEngine:
    """Load the program; ``num_threads`` sets torch's number for the whole process."""
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError("torch") from error
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return EagerEngine(path)


def _is_fixed(node: Node) -> bool:
    """Say whether what a node gives depends on its inputs, and on nothing else."""
    import torch

    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and bool(node.all_input_nodes) and torch.Tag.nondeterministic_seeded not in tags
