"""Training or evaluation, written into the operators of a captured graph, by the modes of the modules that they are of.

In a module, an operator asks its own ``self.training``. A graph keeps what it was told at capture, so here each such
operator is told again, whenever a mode has changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

__all__ = ["modules_at_rest", "note_constants", "owner_of", "rests", "set_mode"]

# Where each operator keeps its train-or-eval argument.
_MODE_ARGUMENT: dict[Any, int] = {
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.dropout_.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.feature_dropout_.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.alpha_dropout_.default: 2,
    torch.ops.aten.feature_alpha_dropout.default: 2,
    torch.ops.aten.feature_alpha_dropout_.default: 2,
    torch.ops.aten.instance_norm.default: 5,
    torch.ops.aten.rrelu.default: 3,
    torch.ops.aten.rrelu_.default: 3,
    torch.ops.aten.lstm.input: 6,
    torch.ops.aten.gru.input: 6,
    torch.ops.aten.rnn_tanh.input: 6,
    torch.ops.aten.rnn_relu.input: 6,
}
_NORMS = (torch.ops.aten.batch_norm.default,)
_WITH_STATISTICS = (*_NORMS, torch.ops.aten.instance_norm.default)
_CONSTANT = "compress_mode_is_constant"


def modules_at_rest(network: nn.Module) -> list[str]:
    """Return the names of the modules that are in evaluation inside a network in training.

    Example:
        >>> modules_at_rest(nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval()))
        ['1']
    """
    if not network.training:
        return []
    return [name for name, module in network.named_modules(remove_duplicate=False) if not module.training]


def note_constants(graph_module: GraphModule, *, training: bool) -> None:
    """Leave operators alone, from now on, whose mode is written into the network's code, as dropout of Monte Carlo is.

    They are those that were told something else than all modules were in.

    Args:
        graph_module: Just captured.
        training: Whether all modules of the network were in training then, or in evaluation.
    """
    for node in graph_module.graph.nodes:
        position = _position(node)
        if position is not None and _arguments(node, position)[position] != training:
            node.meta[_CONSTANT] = True


def owner_of(node: Node) -> str:
    """Return the name of the module that an operator is of: of the one that has its statistics, or that calls it."""
    if node.target in _WITH_STATISTICS:
        return str(node.args[3].target).rpartition(".")[0]  # type: ignore[union-attr]
    entries: dict[Any, Any] = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(entries.values()))[0]) if entries else ""


def rests(name: str, frozen: Collection[str], modes: Mapping[str, bool]) -> bool:
    """Say whether a module is in evaluation.

    Args:
        name: Its name in the network that was captured.
        frozen: Modules that stay in evaluation.
        modes: Of the modules that the graph has: those with parameters or buffers. Another one goes with what has it.

    Example:
        >>> rests("body.drop", (), {"": True, "body": False})
        True
    """
    if name in frozen:
        return True
    while name and name not in modes:
        name = name.rpartition(".")[0]
    return not modes.get(name, True)


def set_mode(
    graph_module: GraphModule, frozen: Collection[str], modes: Mapping[str, bool], *, training: bool, learning: bool
) -> None:
    """Write modes into a graph where they differ from what stands there.

    Args:
        graph_module: Captured; changed in place.
        frozen: As for ``rests``.
        modes: As for ``rests``.
        training: Of the whole.
        learning: Whether BatchNorms are, unless they rest.
    """
    changed = False
    for node in graph_module.graph.nodes:
        position = _position(node)
        if position is None or _CONSTANT in node.meta:
            continue
        wanted = learning if node.target in _NORMS else training
        wanted = wanted and not rests(owner_of(node), frozen, modes)
        given = _arguments(node, position)
        if given[position] != wanted:
            node.args = (*given[:position], wanted, *given[position + 1 :])
            changed = True
    if changed:
        graph_module.recompile()


def _position(node: Node) -> int | None:
    """Return where a node has its mode; a norm without running statistics takes those of the batch in both."""
    position = _MODE_ARGUMENT.get(node.target)
    return None if position is None or (node.target in _WITH_STATISTICS and node.args[3] is None) else position


def _arguments(node: Node, position: int) -> tuple[Any, ...]:
    """Return a node's arguments up to a position: export leaves out those that have their default."""
    given = node.args
    missing = node.target._schema.arguments[len(given) : position + 1]  # type: ignore[union-attr]
    return given + tuple(argument.default_value for argument in missing)
