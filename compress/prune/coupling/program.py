"""The graph that couplings are read from."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from compress.errors import CaptureError
from compress.surgery.blame import layer_and_line

__all__ = ["static_graph"]

_CONTAINERS = (dict, list, set)


def static_graph(network: nn.Module, inputs: Sequence[Tensor]) -> GraphModule:
    """Export a network with the sizes of its example inputs, as a graph of its own tensors in the order of their use.

    Running its code on tensors without data is several times faster than reading its bytecode, which is done where
    the former fails. The network is left untouched, whatever its code remembers between calls.

    Raises:
        CaptureError: when it cannot be exported; the message has the reason and, where known, the line.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer would hide what is in it
    try:
        return _in_order_of_use(_program(network, tuple(inputs)).module(check_guards=False))  # type: ignore[arg-type]
    except Exception as error:  # torch.export raises many kinds; each means the same to the user
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        where = layer_and_line(network, error)
        raise CaptureError(
            f"prune: expected a network that torch.export can capture, got {type(network).__name__}: "
            f"{lines[0] if lines else type(error).__name__}{where}. Move control flow that depends on data out of it, "
            "or prune its parts one by one; distillation and the artefact do not need this."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _program(network: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    with contextlib.suppress(Exception):
        program = torch.export.export(_twin(network, {}), inputs, strict=False)
        if not _bypasses(program, network):
            return program
    return torch.export.export(network, inputs, strict=True)


def _bypasses(program: ExportedProgram, network: nn.Module) -> bool:
    """Say whether code has reached parameters past the twin, as a compiled part does: they are constants then."""
    owned = {parameter.data_ptr() for parameter in network.parameters()} - {0}
    return any(isinstance(each, Tensor) and each.data_ptr() in owned for each in program.constants.values())


def _in_order_of_use(graph_module: GraphModule) -> GraphModule:
    """Move tensors to the order in which they are first used, and leave out those that are not used by any name."""
    nodes = list(graph_module.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    tensors = {node: _attribute(graph_module, str(node.target)) for node in nodes if node.op == "get_attr"}
    first_use: dict[int, int] = {}
    for node, tensor in tensors.items():
        for user in node.users:
            first_use[id(tensor)] = min(place[user], first_use.get(id(tensor), place[user]))
    first = next(node for node in nodes if node.op != "get_attr")
    for node in sorted((n for n in tensors if id(tensors[n]) in first_use), key=lambda n: first_use[id(tensors[n])]):
        first.prepend(node)
    for node, tensor in tensors.items():
        if id(tensor) not in first_use:
            graph_module.graph.erase_node(node)
            owner, _, leaf = str(node.target).rpartition(".")
            if hasattr(graph_module.get_submodule(owner), leaf):
                delattr(graph_module.get_submodule(owner), leaf)
    graph_module.recompile()
    return graph_module


def _attribute(graph_module: GraphModule, name: str) -> object:
    owner, _, leaf = name.rpartition(".")
    return getattr(graph_module.get_submodule(owner), leaf)


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """Return a module with the same tensors and an own place for whatever else its code may assign or collect."""
    if id(module) not in twins:
        twin = twins[id(module)] = object.__new__(type(module))
        twin.__dict__ = {
            key: copy.copy(value) if isinstance(value, _CONTAINERS) else value
            for key, value in vars(module).items()
            if key != "_compiled_call_impl"  # it belongs to the module itself
        }
        for name, child in module._modules.items():
            twin._modules[name] = child if child is None else _twin(child, twins)
    return twins[id(module)]
