"""Whole blocks: which modules of a network may be left out, how much each does, and leaving them out.

A block adds something to what it is given and hands that on, so a network runs without it: residual blocks and
transformer layers alike. They are read off the exported graph, whose nodes remember the modules they came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from compress.errors import EditError
from compress.prune.anatomy import Anatomy
from compress.prune.coupling.context import operators

__all__ = ["Block", "Skip", "check_blocks", "find_blocks", "read_blocks", "remove_blocks", "skip_blocks"]

_ADDS = frozenset(operators("add.Tensor add_.Tensor"))
# What keeps every element in its place: an identity path may lead through it before or behind the sum.
_KEEPS = frozenset(
    operators(
        "layer_norm.default rms_norm.default batch_norm.default group_norm.default instance_norm.default "
        "relu.default relu_.default relu6.default relu6_.default leaky_relu.default leaky_relu_.default gelu.default "
        "silu.default silu_.default hardswish.default hardswish_.default hardtanh.default hardtanh_.default "
        "elu.default elu_.default prelu.default mish.default mish_.default tanh.default "
        "dropout.default dropout_.default clone.default contiguous.default alias.default detach.default "
        "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int "
        "to.dtype to.dtype_layout to.device to.other _to_copy.default"
    )
)


@dataclass(frozen=True)
class Block:
    """A module that a network can do without.

    Args:
        name: The module's name in the network.
        source: The activation that it is given.
        result: What it makes of it, of the same shape; nothing else of it is used.
        nodes: All its operators, in order.
    """

    name: str
    source: Node
    result: Node
    nodes: tuple[Node, ...]


class Skip(nn.Module):
    """What stands where a block was: returns its first argument.

    Args:
        replaced: The block; its plain attributes stay readable, since code that loops over layers may ask for them.

    Example:
        >>> Skip(nn.Linear(2, 3))(torch.ones(1))
        tensor([1.])
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        for key, value in vars(replaced).items():
            if not key.startswith("_") and isinstance(value, bool | int | float | str | None):
                setattr(self, key, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument."""
        return args[0] if args else next(iter(kwargs.values()))


def find_blocks(anatomy: Anatomy) -> dict[str, Block]:
    """Find the blocks of a network that may be removed, by the names of their modules.

    A layer that was to be ignored protects the blocks around it, below it, and itself.

    Args:
        anatomy: The network.

    Example:
        >>> from compress.models import ResNet
        >>> from compress.prune import study
        >>> list(find_blocks(study(ResNet(1, width=4, blocks=(1, 2)), [torch.ones(2, 1, 8, 8)])))
        ['stages.0.0', 'stages.1.1']
    """
    return {
        name: block
        for name, block in read_blocks(anatomy.graph).items()
        if not any(_below(name, entry) or _below(entry, name) for entry in anatomy.ignore)
    }


def read_blocks(graph_module: GraphModule) -> dict[str, Block]:
    """Find the blocks of a graph, as an exported program's ``module()`` or ``Captured`` gives it.

    A block is a child of a container of layers whose operators hold parameters of their own, give one result of the
    shape and type of one thing given, and have a way from this to that through a sum with something computed from it
    (and through activations, normalisations and views, which leave elements in their places). Of blocks within blocks
    the innermost count.
    """
    members: dict[str, list[Node]] = {}
    containers: set[str] = set()
    for node in graph_module.graph.nodes:
        for name, kind in _stack(node):
            members.setdefault(name, []).append(node)
            if str(kind).endswith("Sequential"):
                containers.add(name)
    found = {}
    for name, nodes in members.items():
        parent, _, leaf = name.rpartition(".")
        if leaf.isdigit() or (leaf and parent in containers):
            block = _block(name, nodes)
            if block is not None:
                found[name] = block
    return {name: b for name, b in found.items() if not any(o != name and _below(o, name) for o in found)}


def check_blocks(names: Iterable[str], blocks: Mapping[str, Block]) -> None:
    """Refuse what is no block.

    Raises:
        EditError: listing the blocks.
    """
    for name in names:
        if name not in blocks:
            raise EditError(
                f"prune.blocks: expected names among {', '.join(blocks) or 'none'}, got {name!r}. "
                "A block adds to what it is given and keeps its shape, and no layer of it is ignored."
            )


def skip_blocks(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """Put a ``Skip`` in the place of each block, in place.

    Raises:
        EditError: when there is no module of that name; the network is then untouched.
    """
    modules = dict(network.named_modules())
    for name in names:
        if name not in modules:
            raise EditError(f"edit: expected a block named {name!r}, got none. Is this the network that was edited?")
    for name in names:
        parent, _, leaf = name.rpartition(".")
        modules[parent]._modules[leaf] = Skip(modules[name])
    return network


def remove_blocks(graph_module: GraphModule, names: Sequence[str]) -> GraphModule:
    """Take blocks out of a graph, with the parameters and buffers that nothing else uses, in place.

    Raises:
        EditError: when there is no block of that name, or nothing would be left to train.
    """
    blocks = read_blocks(graph_module)
    check_blocks(names, blocks)
    before = _tensors_used(graph_module)
    instead: dict[Node, Node] = {}
    for block in [block for name, block in blocks.items() if name in names]:  # in the order of the graph
        source = instead.get(block.source, block.source)
        instead[block.result] = source
        block.result.replace_all_uses_with(source)
        for node in reversed(block.nodes):
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    after = _tensors_used(graph_module)
    for name in names:
        graph_module.delete_submodule(name)
    for name in before - after:
        owner, _, leaf = name.rpartition(".")
        if any(name.startswith(f"{gone}.") for gone in names):
            continue
        delattr(graph_module.get_submodule(owner), leaf)
    if not any(True for _ in graph_module.parameters()):
        raise EditError("prune.blocks: expected some parameters to stay, got all blocks of a network. Keep one.")
    graph_module.recompile()
    return graph_module


def _below(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def _stack(node: Node) -> list[tuple[str, Any]]:
    entries: Mapping[Any, Any] = node.meta.get("nn_module_stack") or {}
    return [(name, kind) for name, kind in entries.values() if name]


def _shape(node: Node) -> tuple[int, ...] | None:
    """Return the shape of a node's result, for the example inputs; none where it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else int(size.node.hint) for size in value.shape)


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)


def _block(name: str, nodes: Sequence[Node]) -> Block | None:
    inside = set(nodes)
    # Sizes are computed where they are first asked for, and used by others.
    while shared := {node for node in inside if _is_number(node) and set(node.users) - inside}:
        inside -= shared
    results = [node for node in nodes if node in inside and set(node.users) - inside]
    given = dict.fromkeys(entry for node in nodes if node in inside for entry in node.all_input_nodes)
    outside = [node for node in given if node not in inside]
    parameters = [node for node in outside if node.op == "get_attr"]
    if len(results) != 1 or not any(str(node.target).startswith(f"{name}.") for node in parameters):
        return None
    if any(str(node.target).startswith(f"{name}.") and set(node.users) - inside for node in parameters):
        return None  # something else reads its weights
    (result,) = results
    same = [
        node
        for node in outside
        if node.op != "get_attr"
        and _shape(node) is not None
        and _shape(node) == _shape(result)
        and node.meta["val"].dtype == result.meta["val"].dtype
        and _adds_to(node, result, inside)
    ]
    if len(same) != 1:
        return None
    return Block(name, same[0], result, tuple(node for node in nodes if node in inside))


def _adds_to(source: Node, result: Node, inside: set[Node]) -> bool:
    """Say whether a way leads from source to result on which elements stay in place and meet what was made of them."""
    made = {source}
    stack = [source]
    while stack:
        fresh = {user for user in stack.pop().users if user in inside} - made
        made |= fresh
        stack.extend(fresh)
    seen = {(source, False)}
    todo = [(source, False)]
    while todo:
        node, added = todo.pop()
        if node is result and added:
            return True
        for user in node.users:
            if user not in inside:
                continue
            if user.target in _ADDS and user.kwargs.get("alpha", 1) == 1:
                other = user.args[1] if user.args[0] is node else user.args[0]
                step = (user, added or (other is not node and other in made))
                if other is node or _shape(user) != _shape(node):
                    continue
            elif user.target in _KEEPS and user.args[0] is node:
                step = (user, added)
            else:
                continue
            if step not in seen:
                seen.add(step)
                todo.append(step)
    return False


def _tensors_used(graph_module: GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
