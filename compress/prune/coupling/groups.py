"""Units as plain data: groups of interchangeable units, each a set of parameter slices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from compress.errors import CaptureError
from compress.prune.coupling.walk import Labels, walk

__all__ = ["Coupling", "Group", "find_coupling", "read_coupling", "static_program"]

Slot = tuple[str, int]
"""A tensor's name and one of its dimensions."""


@dataclass(frozen=True)
class Group:
    """Units of one kind: any of them can be removed, as long as one is left.

    Args:
        name: The layer whose outputs they are (the first of all that are coupled with it).
        slots: For each tensor and dimension, the indices of each unit, shape (units, indices).
        reason: Why all of them must stay, or none.
    """

    name: str
    slots: dict[Slot, Tensor]
    reason: str | None = None

    @property
    def width(self) -> int:
        """The number of units."""
        return len(next(iter(self.slots.values())))


@dataclass(frozen=True)
class Coupling:
    """What ``find_coupling`` has found.

    Args:
        groups: Groups of units that can be removed.
        protected: Groups that must stay, each with its reason.
        unknown: Operators without a rule, and the lines of the model that call them.
        labels: The walk itself, for what rewrites the graph.
        graph_module: The graph.
        shapes: Shape of each parameter by name.
    """

    groups: list[Group]
    protected: list[Group]
    unknown: dict[str, str]
    labels: Labels
    graph_module: GraphModule
    shapes: dict[str, tuple[int, ...]]

    def prunable_share(self) -> float:
        """Return the fraction of parameters that lie in a slice of some unit that can be removed."""
        touched: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for group in self.groups:
            for (name, dim), indices in group.slots.items():
                touched[name][dim] |= set(indices.flatten().tolist())
        total = gone = 0
        for name, shape in self.shapes.items():
            num = torch.Size(shape).numel()
            total += num
            rest = 1.0
            for dim, seen in touched.get(name, {}).items():
                rest *= 1 - len(seen) / shape[dim]
            gone += round(num * (1 - rest))
        return gone / max(1, total)


def static_program(network: nn.Module, inputs: Sequence[Tensor]) -> ExportedProgram:
    """Export a network with the sizes of its example inputs.

    Raises:
        CaptureError: when it cannot be exported; the message has the reason and, where known, the line.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer would hide what is in it
    try:
        return torch.export.export(network, tuple(inputs), strict=True)
    except Exception as error:  # torch.export raises many kinds; each means the same to the user
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        where = _place(lines)
        raise CaptureError(
            f"prune: expected a network that torch.export can capture, got {type(network).__name__}: "
            f"{lines[0] if lines else type(error).__name__}{where}. Move control flow that depends on data out of it, "
            "or prune its parts one by one; distillation and the artefact do not need this."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _place(lines: Sequence[str]) -> str:
    """Return the last line of the user's code in a trace, as `` at FILE:LINE: code``."""
    for position in range(len(lines) - 1, -1, -1):
        if lines[position].startswith('File "') and "site-packages/torch/" not in lines[position]:
            file, _, number = lines[position].removeprefix('File "').partition('", line ')
            code = lines[position + 1] if position + 1 < len(lines) else ""
            return f" at {file}:{number.partition(',')[0]}: {code}"
    return ""


def find_coupling(network: nn.Module, inputs: Sequence[Tensor]) -> Coupling:
    """Find the groups of slices that must be removed together.

    Args:
        network: Left untouched; on the meta device too.
        inputs: Small example inputs.

    Raises:
        CaptureError: when the network cannot be exported.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [(group.name, group.width, sorted(group.slots)) for group in find_coupling(net, [torch.ones(2, 3)]).groups]
        [('0', 4, [('0.bias', 0), ('0.weight', 0), ('2.weight', 1)])]
    """
    training = network.training
    program = static_program(network.eval(), inputs)
    network.train(training)
    return read_coupling(program.module(check_guards=False))


def read_coupling(graph_module: GraphModule) -> Coupling:
    """Find the groups of a graph, as an exported program's ``module()`` or ``Captured`` gives it."""
    with torch.device("cpu"):  # labels are numbers, also of a network that has none
        labels = walk(graph_module)
        labels.units.settle()
    members: dict[int, dict[Slot, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, dims in labels.tensors.items():
        for dim, vector in dims.items():
            for index, root in enumerate(labels.units.find(vector).tolist()):
                members[root][name, dim].append(index)
    kinds: dict[tuple[str | None, tuple[tuple[Slot, int], ...]], list[int]] = defaultdict(list)
    for root, slots in members.items():
        kinds[labels.units.reason(root), tuple((slot, len(indices)) for slot, indices in slots.items())].append(root)
    groups: list[Group] = []
    protected: list[Group] = []
    for (why, kind), roots in kinds.items():
        roots.sort(key=lambda root: next(iter(members[root].values())))
        indices = {slot: torch.tensor([members[root][slot] for root in roots]) for slot, _ in kind}
        whole = any(each.shape[1] == len(labels.tensors[name][dim]) for (name, dim), each in indices.items())
        reason = why or ("it is all that a tensor has" if whole and len(roots) == 1 else None)
        group = Group(_name(indices), indices, reason)
        (protected if reason else groups).append(group)
    shapes = {name: tuple(parameter.shape) for name, parameter in graph_module.named_parameters()}
    return Coupling(groups, protected, labels.unknown, labels, graph_module, shapes)


def _name(slots: dict[Slot, Tensor]) -> str:
    """Return the layer of the first weight whose outputs these are."""
    outputs = [name for name, dim in slots if dim == 0 and name.endswith("weight")]
    first = outputs[0] if outputs else next(iter(slots))[0]
    return first.rpartition(".")[0] or first
