"""Which channels are coupled, how much each matters, and the edit that removes the least; built on Torch-Pruning.

Torch-Pruning knows which slices of which tensors must go together, and does the removal on a copy whose every element
holds its own position. What survives there is read off as plain kept indices, so that an edit does not depend on
Torch-Pruning when it is applied or replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from compress.errors import EditError

__all__ = ["Group", "find_groups", "output_layers", "plan_removal"]

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Group:
    """Channels that can be removed together.

    Args:
        name: The layer whose outputs they are (the first of all that are coupled with it).
        importance: Shape (channels,): group L2 norm over all coupled slices.
    """

    name: str
    importance: Tensor

    @property
    def width(self) -> int:
        """The number of channels."""
        return len(self.importance)


def find_groups(network: nn.Module, inputs: Sequence[Tensor], *, ignore: Iterable[str] = ()) -> list[Group]:
    r"""Find the groups of coupled channels and the importance of each channel.

    .. math:: I_c = \operatorname{mean}_{W \in group} \|W_c\|_2^2          Fang et al. 2023, arXiv:2301.12900

    Args:
        network: Left untouched.
        inputs: Example inputs, at least two samples each.
        ignore: Names of layers whose outputs stay; a name also stands for everything below it. Output layers are
            ignored in any case.

    Raises:
        EditError: when the network cannot be traced, or a name to ignore does not exist.
    """
    twin = copy.deepcopy(network).eval()
    return [group for group, _ in _groups(twin, inputs, ignore)]


def plan_removal(
    network: nn.Module, inputs: Sequence[Tensor], keep: Mapping[str, int], *, ignore: Iterable[str] = ()
) -> dict[str, Any] | None:
    """Describe the removal of the least important channels as data of an edit.

    Args:
        network: Left untouched.
        inputs: Example inputs, at least two samples each.
        keep: ``{group name: channels to keep}``; groups that are not named, or that are small enough, stay.
        ignore: As in ``find_groups``.

    Returns:
        ``{"slices": ..., "attributes": ..., "widths": {group: [before, after]}}`` or ``None`` when nothing is to be
        removed.

    Raises:
        EditError: when the network cannot be traced.
    """
    twin = copy.deepcopy(network).eval()
    removals, widths = [], {}
    for group, root in _groups(twin, inputs, ignore):
        surplus = group.width - keep.get(group.name, group.width)
        if surplus > 0:
            order = torch.argsort(group.importance, stable=True)
            removals.append((root, sorted(order[:surplus].tolist())))
            widths[group.name] = [group.width, group.width - surplus]
    if not removals:
        return None
    slices, attributes = _remove(twin, inputs, removals)
    return {"slices": slices, "attributes": attributes, "widths": widths}


def output_layers(network: nn.Module, inputs: Sequence[Tensor]) -> set[str]:
    """Return the names of the layers whose outputs reach the network's output through no other weight matrix.

    They are found by walking back through autograd's graph, so it does not matter what the layers are called.

    Example:
        >>> output_layers(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), [torch.ones(2, 3)])
        {'2'}
    """
    owners = {
        id(parameter): name.rpartition(".")[0] for name, parameter in network.named_parameters() if parameter.dim() > 1
    }
    with torch.enable_grad():
        outputs = network(*inputs)
    pending = [tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None]
    found, seen = set(), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        weights = {owners[leaf] for parent in parents if (leaf := _leaf(parent)) in owners}
        if weights:
            found |= weights
        else:
            pending += parents
    return found


def _groups(twin: nn.Module, inputs: Sequence[Tensor], ignore: Iterable[str]) -> list[tuple[Group, Any]]:
    # With each group comes what Torch-Pruning needs to remove channels of it.
    names = {module: name for name, module in twin.named_modules()}
    protected = _protected(twin, set(ignore)) | output_layers(twin, inputs)
    graph = _dependency_graph(twin, inputs)
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    found = []
    for group in graph.get_all_groups(
        ignored_layers=[twin.get_submodule(name) for name in sorted(protected)], root_module_types=_ROOTS
    ):
        if any(_is_grouped(dep.target.module) for dep, _ in group):
            continue  # equal numbers per convolution group are not planned yet
        root = group[0].dep
        scores = importance(group)
        if scores is not None:
            # get_all_groups starts every group at the full, ordered list of the root's channels.
            name = names[root.target.module]
            found.append((Group(name, scores.detach()), (name, root.handler)))
    return found


def _dependency_graph(network: nn.Module, inputs: Sequence[Tensor]) -> Any:
    try:
        # A fresh container each time: Torch-Pruning changes the dicts and lists it is given.
        return tp.DependencyGraph().build_dependency(network, example_inputs=tuple(inputs), verbose=False)
    except Exception as error:  # its tracer fails in many ways; each means the same to the user
        raise EditError(
            f"prune: expected a network that Torch-Pruning can trace, got {type(network).__name__}: "
            f"{type(error).__name__}: {error}. Name the layers to leave alone in prune.ignore, or leave prune out."
        ) from error


def _remove(
    twin: nn.Module, inputs: Sequence[Tensor], removals: Sequence[tuple[Any, list[int]]]
) -> tuple[dict[str, dict[str, list[int]]], dict[str, dict[str, Any]]]:
    graph = _dependency_graph(twin, inputs)
    shapes = {}
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        if tensor.dim() > 0:
            shapes[name] = tuple(tensor.shape)
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
    attributes = {name: _plain_attributes(module) for name, module in twin.named_modules()}
    for (name, handler), indices in removals:
        graph.get_pruning_group(twin.get_submodule(name), handler, indices).prune()
    survivors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    slices = {}
    for name, shape in shapes.items():
        positions = survivors[name].detach()
        if tuple(positions.shape) != shape:
            slices[name] = _kept(positions.cpu().long(), shape)
    changed = {
        name: {key: value for key, value in _plain_attributes(module).items() if attributes[name].get(key) != value}
        for name, module in twin.named_modules()
    }
    return slices, {name: values for name, values in changed.items() if values}


def _kept(positions: Tensor, shape: tuple[int, ...]) -> dict[str, list[int]]:
    # An element at a flat position knows its index along every dimension of the old shape.
    kept = {}
    for dim, (before, after) in enumerate(zip(shape, positions.shape)):
        if before != after:
            stride = 1
            for size in shape[dim + 1 :]:
                stride *= size
            line = positions.movedim(dim, 0).reshape(after, -1)[:, 0]
            kept[str(dim)] = ((line // stride) % before).tolist()
    return kept


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(module).items()
        if isinstance(value, int | tuple | list) and key != "training" and not key.startswith("_")
        if isinstance(value, int) or all(isinstance(entry, int) for entry in value)
    }


def _protected(network: nn.Module, ignore: set[str]) -> set[str]:
    names = [name for name, _ in network.named_modules()]
    for wanted in sorted(ignore - set(names)):
        raise EditError(
            f"prune.ignore: expected names of layers, got {wanted!r}. "
            f"The layers are: {', '.join(name for name in names if name)}."
        )
    return {name for name in names if any(name == entry or name.startswith(entry + ".") for entry in ignore)}


def _is_grouped(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    return isinstance(module, nn.modules.conv._ConvNd) and groups not in (1, module.out_channels)


def _leaf(node: Any) -> int | None:
    # Linear layers reach their weight through a transpose (and a cast, under autocast).
    for _ in range(3):
        if hasattr(node, "variable"):
            return id(node.variable)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1 or not node.name().startswith(
            ("TBackward", "ToCopyBackward", "PermuteBackward", "Transpose")
        ):
            return None
        node = parents[0]
    return None


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, Iterable) else []
