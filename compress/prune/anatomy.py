"""A network looked at once: its graph, and the groups of units that can be removed from it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.fx import GraphModule

from compress.errors import EditError
from compress.measure.modes import kept_modes
from compress.prune.coupling import Coupling, Group, read_coupling, static_graph
from compress.surgery import Captured

__all__ = ["Anatomy", "study"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Anatomy:
    """What ``study`` has found.

    Args:
        network: The network itself, whose weights criteria look at.
        inputs: Example inputs, at least two samples each.
        graph: The network as an exported graph, with the same parameter names.
        coupling: What belongs together in it.
        groups: Groups of units that may be removed, by names of their own: the first layer whose outputs they are.
        ignore: Names of layers that are to stay.
        heads: What goes of attention's heads: ``"whole"`` ones, or ``"width"`` of all.
    """

    network: nn.Module
    inputs: tuple[Tensor, ...]
    graph: GraphModule
    coupling: Coupling
    groups: dict[str, Group]
    ignore: frozenset[str] = frozenset()
    heads: str = "whole"

    @property
    def widths(self) -> dict[str, int]:
        """The number of units of each group."""
        return {name: group.width for name, group in self.groups.items()}


def study(network: nn.Module, inputs: Sequence[Tensor], *, ignore: Iterable[str] = (), heads: str = "whole") -> Anatomy:
    """Find out what can be removed from a network.

    Args:
        network: Left untouched.
        inputs: Example inputs, at least two samples each.
        ignore: Names of layers whose outputs stay; a name also stands for everything below it. Output layers are
            ignored in any case.
        heads: ``"whole"``: heads of attention are units; ``"width"``: all heads stay, and a unit is the same place in
            each of them, of queries and keys or of values. Scores keep their scale.

    Raises:
        CaptureError: when the network cannot be exported.
        EditError: when a name to ignore does not exist, or ``heads`` is neither.

    Example:
        >>> import torch
        >>> study(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), [torch.ones(2, 3)]).widths
        {'0': 4}
    """
    if heads not in ("whole", "width"):
        raise EditError(f"prune.heads: expected 'whole' or 'width', got {heads!r}. Choose one.")
    ignore = frozenset(ignore)
    graph = _graph(network, inputs)
    coupling = read_coupling(graph, heads=heads)
    for gap in coupling.gaps():
        log.warning("%s", gap)
    return Anatomy(network, tuple(inputs), graph, coupling, _named(network, coupling, ignore), ignore, heads)


def _graph(network: nn.Module, inputs: Sequence[Tensor]) -> GraphModule:
    if isinstance(network, Captured):
        return copy.deepcopy(network.graph_module)
    with kept_modes(network, training=False):
        return static_graph(network, inputs)


def _named(network: nn.Module, coupling: Coupling, ignore: frozenset[str]) -> dict[str, Group]:
    names = [name for name, _ in network.named_modules()]
    for wanted in sorted(ignore - set(names)):
        raise EditError(
            f"prune.ignore: expected names of layers, got {wanted!r}. "
            f"The layers are: {', '.join(name for name in names if name)}."
        )
    found: dict[str, Group] = {}
    for group in coupling.groups:
        made_by = {name.rpartition(".")[0] for name, dim in group.slots if dim == 0}
        if any(layer == entry or layer.startswith(f"{entry}.") for layer in made_by for entry in ignore):
            continue
        number = sum(name.partition(":")[0] == group.name for name in found)
        name = f"{group.name}:{number + 1}" if number else group.name
        found[name] = replace(group, name=name)
    return found
