"""Units as plain data: groups of interchangeable units, each a set of parameter slices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compress.measure.modes import kept_modes
from compress.measure.threads import torch_threads
from compress.prune.coupling.program import static_graph
from compress.prune.coupling.walk import Labels, walk

__all__ = ["Coupling", "Group", "find_coupling", "read_coupling", "read_labels"]

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

    def gaps(self) -> list[str]:
        """Return a message for each operator without a rule: where it is called, what stays, and what can still go."""
        possible = ", ".join([group.name for group in self.groups][:5]) or "none"
        more = f" and {len(self.groups) - 5} more" if len(self.groups) > 5 else ""
        messages = []
        for name, line in self.unknown.items():
            stay = dict.fromkeys(group.name for group in self.protected if group.reason == f"{name} has no rule")
            messages.append(
                f"prune: expected operators that have a rule, got {name} at {line}. What it touches stays "
                f"({', '.join(stay) or 'no layer'}); what can still be pruned: {possible}{more}, "
                f"{self.prunable_share():.0%} of the parameters. Call other operators there to prune more."
            )
        return messages

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


def find_coupling(network: nn.Module, inputs: Sequence[Tensor], *, heads: str = "whole") -> Coupling:
    """Find the groups of slices that must be removed together.

    Args:
        network: Left untouched; on the meta device too.
        inputs: Small example inputs.
        heads: ``"whole"``: heads of attention go whole; ``"width"``: all stay and lose the same places.

    Raises:
        CaptureError: when the network cannot be exported.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [(group.name, group.width, sorted(group.slots)) for group in find_coupling(net, [torch.ones(2, 3)]).groups]
        [('0', 4, [('0.bias', 0), ('0.weight', 0), ('2.weight', 1)])]
    """
    with kept_modes(network, training=False):
        return read_coupling(static_graph(network, inputs), heads=heads)


def read_coupling(graph_module: GraphModule, *, heads: str = "whole") -> Coupling:
    """Find the groups of a graph, as an exported program's ``module()`` or ``Captured`` gives it."""
    labels = read_labels(graph_module, heads=heads)
    with torch.device("cpu"), torch_threads(1):
        every = list(_groups(labels))
    shapes = {name: tuple(parameter.shape) for name, parameter in graph_module.named_parameters()}
    groups, protected = ([group for group in every if bool(group.reason) == stay] for stay in (False, True))
    return Coupling(groups, protected, labels.unknown, labels, graph_module, shapes)


def read_labels(graph_module: GraphModule, *, heads: str = "whole") -> Labels:
    """Find the units of a graph, and where they lie."""
    # Labels are numbers, also of a network that has none; threads wait for each other longer than they count.
    with torch.device("cpu"), torch_threads(1):
        labels = walk(graph_module, heads)
        labels.units.settle()
    return labels


def _groups(labels: Labels) -> Iterator[Group]:
    slots = {(name, d): labels.units.find(each) for name, dims in labels.tensors.items() for d, each in dims.items()}
    for roots, own in _kinds(slots):
        # Units of one kind may yet differ in why they must stay.
        reasons = labels.units.reasons(roots)
        numbers = {why: number for number, why in enumerate(dict.fromkeys(reasons))}
        kinds = torch.tensor([numbers[reason] for reason in reasons])
        for why, number in numbers.items():
            alike = kinds == number
            indices = {slot: each[alike] for slot, each in own.items()}
            whole = any(each.shape[1] == len(slots[slot]) for slot, each in indices.items())
            reason = why or ("it is all that a tensor has" if whole and int(alike.sum()) == 1 else None)
            yield Group(_name(indices), indices, reason)


def _kinds(roots: dict[Slot, Tensor]) -> Iterator[tuple[Tensor, dict[Slot, Tensor]]]:
    """Yield units that have equally many indices in the same slots, in the order of their first index.

    Args:
        roots: The unit of each index of each slot.

    Yields:
        The units, shape (units,), and their indices by slot, each of shape (units, indices).
    """
    num = max((int(each.max()) for each in roots.values()), default=0) + 1
    signature = np.zeros(num, dtype=np.uint64)
    counted: dict[Slot, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for number, (slot, each) in enumerate(roots.items()):
        order = np.argsort(each.numpy(), kind="stable")
        units, starts, counts = np.unique(each.numpy()[order], return_index=True, return_counts=True)
        counted[slot] = order, units, starts
        # A hash of (slot, count), added up over slots.
        with np.errstate(over="ignore"):
            salt = np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
            signature[units] += (counts.astype(np.uint64) + salt) ** np.uint64(3) * np.uint64(0xBF58476D1CE4E5B9)
    seen = (
        np.unique(np.concatenate([units for _, units, _ in counted.values()])) if counted else np.array([], dtype=int)
    )
    _, first, which = np.unique(signature[seen], return_index=True, return_inverse=True)
    for kind in np.argsort(first):  # labels are given out in the order of the graph
        members = seen[which == kind]
        slots: dict[Slot, Tensor] = {}
        for slot, (order, units, starts) in counted.items():
            position = np.searchsorted(units, members[0])
            if position == len(units) or units[position] != members[0]:
                continue
            ends = np.append(starts[1:], len(order))
            if not slots:  # in the order of the first slot
                members = members[np.argsort(order[starts[np.searchsorted(units, members)]], kind="stable")]
            place = np.searchsorted(units, members)
            count = int(ends[place[0]] - starts[place[0]])
            slots[slot] = torch.from_numpy(order[starts[place][:, None] + np.arange(count)])
        yield torch.from_numpy(members), slots


def _name(slots: dict[Slot, Tensor]) -> str:
    """Return the layer of the first weight whose outputs these are."""
    outputs = [name for name, dim in slots if dim == 0 and name.endswith("weight")]
    first = outputs[0] if outputs else next(iter(slots))[0]
    return first.rpartition(".")[0] or first
