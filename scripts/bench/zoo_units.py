"""The zoo's check of completeness: units as Torch-Pruning removes them, beside ours.

One unit of each of its groups is removed from one copy of the network, group after group, every element of which holds
its own position; what is missing afterwards is the unit. Where it is not one of ours, or several of ours together, it
is removed alone and the network is run.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch_pruning as tp
from limit import OutOfTimeError, processor_time
from torch import Tensor, nn
from zoo_models import build
from zoo_torch_pruning import LIMIT_S, output_layers

from compress.prune.coupling import Coupling, find_coupling

__all__ = ["compare_units"]

Slice = tuple[str, int, int]
Unit = frozenset[Slice]


def compare_units(name: str, row: dict[str, Any]) -> None:
    """Compare one unit of each of Torch-Pruning's groups with ours.

    Args:
        name: Of the architecture.
        row: Gets how many are ``equal``, how many are several of ours (``finer``), how many do not run when
            they are removed (``fails``), how many hold what must stay by ours (``kept``), and how many are left
            (``other``), with examples.
    """
    network, inputs = build(name)
    coupling = find_coupling(network, inputs)
    counts: Counter[str] = Counter()
    examples: list[str] = []
    row |= {"counts": counts, "examples": examples}
    try:
        with processor_time(LIMIT_S):
            ours, kept, slots = _ours(coupling)
            for root, handler, index, unit in _theirs(network, inputs, row):
                unit = frozenset(entry for entry in unit if entry[:2] in slots)
                found = {ours[entry] for entry in unit if entry in ours}
                whole = frozenset(entry for one in found for entry in one)
                if found and whole == unit:
                    kind = "equal" if len(found) == 1 else "finer"
                elif not _runs(network, inputs, root, handler, index):
                    kind = "fails"
                else:
                    kind = "kept" if unit & kept else "other"
                counts[kind] += 1
                if kind in ("kept", "other") and len(examples) < 4:
                    examples.append(f"{kind} {root}: theirs {_brief(unit - whole)}, ours {_brief(whole - unit)}")
    except OutOfTimeError as error:
        row["reason"] = str(error)
    row["counts"] = dict(counts)


def _ours(coupling: Coupling) -> tuple[dict[Slice, Unit], frozenset[Slice], set[tuple[str, int]]]:
    """Return the unit of each slice, the slices that must stay, and the slots that are looked at."""
    parameters = {name for name, _ in coupling.graph_module.named_parameters()}
    looked = {name for name in coupling.labels.tensors if name in parameters or "running_" in name}
    ours: dict[Slice, Unit] = {}
    for group in coupling.groups:
        for number in range(group.width):
            unit = frozenset(
                (name, dim, i)
                for (name, dim), each in group.slots.items()
                if name in looked
                for i in each[number].tolist()
            )
            ours |= dict.fromkeys(unit, unit)
    kept = frozenset(
        (name, dim, i)
        for group in coupling.protected
        for (name, dim), each in group.slots.items()
        for i in each.flatten().tolist()
    )
    return ours, kept, {(name, dim) for name, dims in coupling.labels.tensors.items() if name in looked for dim in dims}


def _theirs(network: nn.Module, inputs: Any, row: dict[str, Any]) -> Any:
    twin = copy.deepcopy(network)
    ignored = output_layers(twin, inputs)
    graph = tp.DependencyGraph().build_dependency(twin, example_inputs=tuple(inputs), verbose=False)
    names = {module: name for name, module in twin.named_modules()}
    roots = []
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=(nn.modules.conv._ConvNd, nn.Linear)):
        dep, indices = group[0]
        roots.append((dep.target.module, dep.handler, len(indices)))
    row["groups"] = len(roots)
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(twin).items() if tensor.dim() > 0}
    for name, tensor in _tensors(twin).items():
        if name in shapes:
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    left = _present(twin, shapes)
    for module, handler, width in roots:
        index = width // 3
        graph.get_pruning_group(module, handler, [index]).prune()
        now = _present(twin, shapes)
        yield names[module], handler, index, frozenset(left - now)
        left = now


def _present(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> set[Slice]:
    """Return the slices whose positions are still there."""
    found: set[Slice] = set()
    tensors = _tensors(network)
    for name, shape in shapes.items():
        positions = tensors[name].detach()
        for dim in range(positions.dim()):
            stride = torch.Size(shape[dim + 1 :]).numel()
            first: Tensor = positions.movedim(dim, 0).flatten(1)[:, 0] if positions.dim() > 1 else positions
            found |= {(name, dim, i) for i in (first.long() // stride % shape[dim]).tolist()}
    return found


def _runs(network: nn.Module, inputs: Any, root: str, handler: Any, index: int) -> bool:
    """Say whether the network still runs when Torch-Pruning has removed one unit."""
    twin = copy.deepcopy(network)
    graph = tp.DependencyGraph().build_dependency(twin, example_inputs=tuple(inputs), verbose=False)
    try:
        graph.get_pruning_group(twin.get_submodule(root), handler, [index]).prune()
        with torch.no_grad():
            twin(*inputs)
    except Exception:  # shapes that do not fit make anything happen
        return False
    return True


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _brief(slices: frozenset[Slice]) -> str:
    slots = Counter((name, dim) for name, dim, _ in slices)
    return ", ".join(f"{name}@{dim} x{num}" for (name, dim), num in sorted(slots.items())[:6]) or "none"
