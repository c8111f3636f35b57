"""Attributes that a module's code follows: what they must be after its parameters have lost slices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["attribute_candidates", "follow_shapes"]

_SIZES = re.compile(
    r"(heads?|nhead|num_heads|dim|size|width|channels?|features|hidden|embed|inner|planes|groups|chs)s?($|_)"
)


def follow_shapes(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return ``{module: {attribute: value}}`` for the layers of ``torch.nn`` whose weights say other than they do.

    Args:
        network: Its parameters have been sliced, its attributes not.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> layer.weight = nn.Parameter(layer.weight[:2])
        >>> follow_shapes(nn.Sequential(layer))
        {'0': {'out_features': 2}}
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, module in network.named_modules():
        for kind, read in _READERS.items():
            if isinstance(module, kind):
                found = {key: value for key, value in read(module) if getattr(module, key) != value}
                if found:
                    changes.setdefault(name, {}).update(found)
    return changes


def attribute_candidates(network: nn.Module, sizes: Mapping[str, Mapping[int, int]]) -> dict[str, dict[str, Any]]:
    """Return attributes of user-written modules that hold a size which has changed below them.

    They are guesses, by name and by value; whoever takes them must run the network.

    Args:
        network: Untouched.
        sizes: ``{module: {old size: new size}}`` of what changed in the parameters right in or below a module.
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, module in network.named_modules():
        if type(module).__module__.startswith("torch.nn.") or name not in sizes:
            continue
        for key, value in vars(module).items():
            if isinstance(value, int) and not isinstance(value, bool) and value in sizes[name] and _SIZES.search(key):
                changes.setdefault(name, {})[key] = sizes[name][value]
    return changes


Pairs = Iterator[tuple[str, Any]]


def _convolution(module: Any) -> Pairs:
    weight: Tensor = module.weight
    groups = module.groups
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        if groups > 1:
            groups = weight.shape[0] // (module.in_channels // groups)
        yield from (("in_channels", weight.shape[0]), ("out_channels", weight.shape[1] * groups))
    else:
        if groups > 1:
            groups = weight.shape[0] // (module.out_channels // groups)
        yield from (("in_channels", weight.shape[1] * groups), ("out_channels", weight.shape[0]))
    yield "groups", groups


def _linear(module: Any) -> Pairs:
    yield from (("out_features", module.weight.shape[0]), ("in_features", module.weight.shape[1]))


def _norm(module: Any) -> Pairs:
    tensor = module.weight if module.weight is not None else module.running_mean
    if tensor is not None:
        yield "num_features", len(tensor)


def _layer_norm(module: Any) -> Pairs:
    if module.weight is not None:
        yield "normalized_shape", tuple(module.weight.shape)


def _group_norm(module: Any) -> Pairs:
    if module.weight is not None:
        num = len(module.weight)
        groups = module.num_groups if module.num_groups == 1 else num // (module.num_channels // module.num_groups)
        yield from (("num_groups", groups), ("num_channels", num))


def _recurrent(module: Any) -> Pairs:
    yield from (("hidden_size", module.weight_hh_l0.shape[1]), ("input_size", module.weight_ih_l0.shape[1]))


_READERS: dict[type, Callable[[Any], Pairs]] = {
    nn.modules.conv._ConvNd: _convolution,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.RNNBase: _recurrent,
    nn.Embedding: lambda module: iter([("embedding_dim", module.weight.shape[1])]),
    nn.PReLU: lambda module: iter([("num_parameters", len(module.weight))]),
}
