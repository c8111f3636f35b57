"""The edit that removes chosen units from a network, and how it is carried out.

An edit is carried out on the module itself where its code follows its attributes, and on its captured graph where sizes
are written into the code; which of the two is found by trying both and comparing what they compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compress.prune.anatomy import Anatomy, study
from compress.prune.attributes import attribute_candidates, follow_shapes
from compress.prune.blocks import check_blocks, find_blocks, remove_blocks, skip_blocks
from compress.prune.coupling import Group, read_labels, resize
from compress.prune.criteria import score_groups
from compress.surgery import Captured, Edit, apply_slices, capture
from compress.surgery.modes import modules_at_rest
from compress.surgery.slicing import Slices, check_shapes, shapes_of

__all__ = ["apply_removal", "describe_removal", "find_groups", "plan_removal", "replay_prune"]

Network = TypeVar("Network", bound=nn.Module)


def find_groups(network: nn.Module, inputs: Sequence[Tensor], *, ignore: Iterable[str] = ()) -> list[Group]:
    """Find the groups of removable units.

    Args:
        network: Left untouched.
        inputs: Example inputs, at least two samples each.
        ignore: Names of layers whose outputs stay; a name also stands for everything below it. Output layers are
            ignored in any case.

    Raises:
        CaptureError: when the network cannot be exported.
        EditError: when a name to ignore does not exist.
    """
    return list(study(network, inputs, ignore=ignore).groups.values())


def plan_removal(
    network: nn.Module,
    inputs: Sequence[Tensor],
    keep: Mapping[str, int],
    *,
    ignore: Iterable[str] = (),
    criterion: str = "l2",
) -> dict[str, Any] | None:
    """Describe the removal of the least important units as data of an edit.

    Args:
        network: Left untouched.
        inputs: Example inputs, at least two samples each.
        keep: ``{group name: units to keep}``; groups that are not named, or that are small enough, stay.
        ignore: As in ``find_groups``.
        criterion: What says how much a unit matters, of those that need weights alone.

    Returns:
        As ``describe_removal``.

    Raises:
        CaptureError: when the network cannot be exported.
        EditError: when what is left does not run.
    """
    anatomy = study(network, inputs, ignore=ignore)
    return describe_removal(anatomy, least(score_groups(anatomy, criterion), keep))


def least(scores: Mapping[str, Tensor], keep: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the units with the lowest scores of each group, as many as are more than it keeps.

    Args:
        scores: Shape (units,) for each group.
        keep: Units to keep; a group that is not named keeps all.

    Example:
        >>> least({"a": torch.tensor([3.0, 1.0, 2.0])}, {"a": 1})
        {'a': tensor([1, 2])}
    """
    return {
        name: torch.argsort(score, stable=True)[: len(score) - keep[name]].sort().values.cpu()
        for name, score in scores.items()
        if keep.get(name, len(score)) < len(score)
    }


def describe_removal(
    anatomy: Anatomy, gone: Mapping[str, Tensor], *, blocks: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Describe the removal of chosen units and blocks as data of an edit.

    Args:
        anatomy: The network.
        gone: ``{group name: indices of units}``.
        blocks: Names among ``find_blocks``.

    Returns:
        ``{"slices", "attributes", "widths": {group: [before, after]}, "form": "module" or "graph", "inputs",
        "shapes": {tensor: shape before}}``, with ``"blocks"`` where some go, ``"heads"`` where they lose width
        and, of a graph, ``"frozen"``, the modules in evaluation;
        ``None`` when nothing is to be removed.

    Raises:
        EditError: when a block is none that may be removed, or what is left does not run.
    """
    reference = _copy(anatomy.graph)
    if blocks:
        check_blocks(blocks, find_blocks(anatomy))
        remove_blocks(reference, blocks)
    present = _tensors(reference)
    widths = {}
    missing: dict[tuple[str, int], set[int]] = {}
    for name, units in gone.items():
        group = anatomy.groups[name]
        slots = {slot: indices for slot, indices in group.slots.items() if slot[0] in present}
        if len(units) and slots:
            widths[name] = [group.width, group.width - len(units)]
            for slot, indices in slots.items():
                missing.setdefault(slot, set()).update(indices[units].flatten().tolist())
    if not widths and not blocks:
        return None
    slices: dict[str, dict[str, list[int]]] = {}
    for (name, dim), absent in missing.items():
        size = len(anatomy.coupling.labels.tensors[name][dim])
        slices.setdefault(name, {})[str(dim)] = [i for i in range(size) if i not in absent]
    network = anatomy.network
    slices = _with_ties(network, slices)
    reference = _shrink(reference, slices, anatomy.heads)
    described = [[list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for tensor in anatomy.inputs]
    shapes = shapes_of(network, slices)
    data: dict[str, Any] = {"slices": slices, "widths": widths, "inputs": described, "shapes": shapes}
    if blocks:
        data["blocks"] = list(blocks)
    if anatomy.heads != "whole":
        data["heads"] = anatomy.heads
    if isinstance(network, Captured):
        attributes = None
    else:
        lost = _tensors(anatomy.graph) - present
        attributes = _attributes(anatomy, slices, blocks, reference, lost)
    if attributes is None:
        return {**data, "attributes": {}, "form": "graph", "frozen": modules_at_rest(network)}
    return {**data, "attributes": attributes, "form": "module"}


def apply_removal(network: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    """Carry out what ``plan_removal`` describes.

    Returns:
        The same module, or its captured graph where its code has sizes written in.

    Raises:
        EditError: when this is not the network that the removal was planned for; it is then untouched.
    """
    check_shapes(network, data.get("shapes"))
    blocks = data.get("blocks", ())
    if data.get("form", "module") == "module":
        return apply_slices(skip_blocks(network, blocks), data["slices"], data["attributes"])
    if not isinstance(network, Captured):
        like = next(network.parameters())
        inputs = [_example(shape, dtype, like) for shape, dtype in data["inputs"]]
        # Not in training mode: a random branch of the user's code, as stochastic depth, would stay in evaluation.
        network = capture(network, inputs, mode="eval", frozen=data.get("frozen"))
    if blocks:
        remove_blocks(network.graph_module, blocks)
    _shrink(network.graph_module, data["slices"], data.get("heads", "whole"))
    network.forget_taps()
    return network


def replay_prune(network: nn.Module, edit: Edit) -> nn.Module:
    """Carry out an edit of kind ``"prune"``."""
    return apply_removal(network, edit.data)


def _with_ties(network: nn.Module, slices: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, list[int]]]:
    """Name tied tensors by the name under which a module lists them."""
    listed = {id(tensor): name for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    every = dict([*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)])
    return {listed[id(every[name])] if name in every else name: kept for name, kept in slices.items()}


def _shrink(graph: GraphModule, slices: Slices, heads: str) -> GraphModule:
    """Remove slices from a graph's parameters and write the new sizes into it."""
    if not slices:
        return graph
    labels = read_labels(graph, heads=heads)
    removed = []
    for name, dims in slices.items():
        for dim, kept in dims.items():
            vector = labels.tensors[name][int(dim)]
            gone = torch.ones(len(vector), dtype=torch.bool)
            gone[kept] = False
            removed.append(vector[gone])
    resize(graph, labels, torch.cat(removed))
    apply_slices(graph, slices, {})
    return graph


def _copy(network: Network) -> Network:
    """Copy a network but for its parameters, which cutting replaces and running leaves alone."""
    return copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})


def _tensors(network: nn.Module) -> set[str]:
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    return {name for name, _ in tensors}


def _attributes(
    anatomy: Anatomy, slices: Slices, blocks: Sequence[str], reference: GraphModule, lost: set[str]
) -> dict[str, dict[str, Any]] | None:
    """Return the attributes with which the module computes what the shrunk graph does, or none where no such are."""
    network, inputs = anatomy.network, anatomy.inputs
    with torch.no_grad():
        expected = _flat(reference(*inputs))
    plain = skip_blocks(_copy(network).eval(), blocks)
    if lost & _tensors(plain):
        return None  # they would stay without a use, which DDP refuses
    for guesses in ({}, attribute_candidates(network, _changed_sizes(network, slices, anatomy.heads))):
        twin = apply_slices(_copy(plain), slices, {})
        attributes = {**follow_shapes(twin)}
        for name, values in guesses.items():
            attributes.setdefault(name, {}).update(values)
        apply_slices(twin, {}, attributes)
        try:
            with torch.no_grad():
                got = _flat(twin(*inputs))
        except Exception:  # sizes written into the code make anything happen
            continue
        if len(got) == len(expected) and all(_alike(a, b) for a, b in zip(got, expected)):
            return {
                name: {k: list(v) if isinstance(v, tuple) else v for k, v in d.items()}
                for name, d in attributes.items()
            }
    return None


def _changed_sizes(network: nn.Module, slices: Slices, heads: str) -> dict[str, dict[int, int]]:
    """Return old and new sizes of what changes in or below each module, and the same divided into heads."""
    per_head = _PER_HEAD[heads]
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    changes: dict[str, dict[int, int]] = {"": {}}
    for name, dims in slices.items():
        for dim, kept in dims.items():
            old, new = tensors[name].shape[int(dim)], len(kept)
            owner = name.rpartition(".")[0]
            while True:
                changes.setdefault(owner, {}).setdefault(old, new)
                if not owner:
                    break
                owner = owner.rpartition(".")[0]
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            if (
                isinstance(value, int)
                and not isinstance(value, bool)
                and "head" in key
                and value > 1
                and name in changes
            ):
                for old, new in list(changes[name].items()):
                    if old % value == 0 and old > value:
                        for before, after in per_head(value, old // value, new):
                            changes[name].setdefault(before, after)
    return changes


# From the number of heads, their width and what both of them make in the end: an old and a new size.
_PER_HEAD: dict[str, Callable[[int, int, int], list[tuple[int, int]]]] = {
    "whole": lambda num, width, left: [(num, left // width)] if left % width == 0 else [],
    "width": lambda num, width, left: [(width, left // num)] if left % num == 0 else [],
}


def _alike(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got.float(), expected.float(), rtol=1e-3, atol=1e-4)


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for value in values for tensor in _flat(value)] if isinstance(values, Iterable) else []


def _example(shape: Sequence[int], dtype: str, like: Tensor) -> Tensor:
    kind = getattr(torch, dtype)
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind, device=like.device)
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
