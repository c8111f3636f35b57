"""Which weights are zero: pure functions from weights to masks, without structure or by the pattern N:M.

A mask is true where a weight stays. Its zeros are the weights of least magnitude, so a larger mask of the same weights,
held at zero by a smaller one, only loses more of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from compress.errors import EditError, RecipeError
from compress.surgery import Captured

__all__ = ["global_masks", "magnitude_mask", "nm_mask", "parse_pattern", "sparse_weights"]

_PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def magnitude_mask(weight: Tensor, ratio: float) -> Tensor:
    """Keep the weights of largest magnitude.

    Args:
        weight: Any shape.
        ratio: Fraction that goes, in [0, 1]; rounded to whole weights.

    Returns:
        Bool, of the weight's shape; of equal weights the first go.

    Example:
        >>> magnitude_mask(torch.tensor([3.0, -1.0, 2.0, 0.5]), 0.5)
        tensor([ True, False,  True, False])
    """
    return global_masks({"": weight}, ratio)[""]


def global_masks(weights: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Keep the weights of largest magnitude of all tensors together.

    Args:
        weights: On one device.
        ratio: Fraction of all weights that goes, in [0, 1].

    Returns:
        A mask for each weight.

    Example:
        >>> global_masks({"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([1.0, 2.0])}, 0.5)
        {'a': tensor([True, True]), 'b': tensor([False, False])}
    """
    every = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    mask = torch.ones_like(every, dtype=torch.bool)
    mask[torch.argsort(every, stable=True)[: round(ratio * len(every))]] = False
    pieces = mask.split([weight.numel() for weight in weights.values()])
    return {name: piece.view(weight.shape) for (name, weight), piece in zip(weights.items(), pieces)}


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Keep the n largest of every m weights that follow each other along the inputs.

    This is the direction that sparse matrix units read (Mishra et al. 2021, arXiv:2104.08378): inputs of a
    linear layer, and of a convolution the channels at each position of its kernel.

    Args:
        weight: Shape (outputs, inputs, ...), inputs a multiple of m.
        n: How many stay, in [1, m].
        m: Of how many.

    Returns:
        Bool, of the weight's shape.

    Raises:
        EditError: when inputs do not divide into groups of m.

    Example:
        >>> nm_mask(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), 2, 4)
        tensor([[ True, False,  True, False]])
    """
    if weight.dim() < 2 or weight.shape[1] % m:
        raise EditError(
            f"sparsify.pattern: expected a weight whose inputs divide into groups of {m}, got shape "
            f"{tuple(weight.shape)}. Name its layer in sparsify.ignore."
        )
    groups = weight.detach().abs().movedim(1, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, torch.argsort(groups, dim=-1, descending=True, stable=True)[..., :n], True)
    return mask.flatten(-2).movedim(-1, 1).contiguous()


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return n and m of ``"n:m"``, or none for ``"unstructured"``.

    Raises:
        RecipeError: for anything else.

    Example:
        >>> parse_pattern("2:4"), parse_pattern("unstructured")
        ((2, 4), None)
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise RecipeError(
            f"sparsify.pattern: expected 'unstructured' or N:M with 1 <= N < M, got {pattern!r}. Use '2:4', say."
        )
    return int(match[1]), int(match[2])


def sparse_weights(network: nn.Module, ignore: Sequence[str] | None = None) -> list[str]:
    """Return the names of the weights that may become sparse, in the order of the network.

    Those are the matrices and kernels of linear, convolution and recurrent layers and of ``nn.MultiheadAttention``;
    never biases, normalisations, embeddings and bare parameters, nor weights of a single input for each output (as of
    a depthwise convolution).

    Args:
        network: A module or its captured graph.
        ignore: Names of layers that stay dense; a name also stands for everything below it. Without such, the first
            weight and the last one stay: they read the raw input and give the output, and are small.

    Raises:
        EditError: when a name to ignore does not exist.
    """
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    found = _read(network) if isinstance(network, Captured) else _held(network)
    found = [name for name in dict.fromkeys(found) if name in shapes and len(shapes[name]) > 1]
    if ignore is None:
        found = found[1:-1]
    else:
        known = {name.rpartition(".")[0] for name in shapes}
        for wanted in ignore:
            if not any(name == wanted or name.startswith(f"{wanted}.") for name in known):
                raise EditError(
                    f"sparsify.ignore: expected names of layers with weights, got {wanted!r}. "
                    f"The layers are: {', '.join(sorted(known))}."
                )
        found = [name for name in found if not any(name.startswith(f"{entry}.") for entry in ignore)]
    return [name for name in found if shapes[name][1] > 1]


def _held(network: nn.Module) -> list[str]:
    """Return the weights of the layers that a module holds."""
    found = []
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.RNNBase):
            found += [f"{prefix}{own}" for own, _ in module.named_parameters() if own.startswith("weight_")]
        elif isinstance(module, nn.MultiheadAttention):
            found += [f"{prefix}{own}_weight" for own in ("in_proj", "q_proj", "k_proj", "v_proj")]
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not getattr(module, "transposed", False):
            found.append(f"{prefix}weight")
    return found


def _read(network: Captured) -> list[str]:
    """Return the weights that products of a graph read."""
    found = []
    for node in network.graph_module.graph.nodes:
        operator = str(node.target).removeprefix("aten.").partition(".")[0]
        if node.op == "call_function" and operator in (*_PRODUCTS, *_RECURRENT):
            given: Any = node.args[2] if operator in _RECURRENT else node.args[1:2]
            found += [str(arg.target) for arg in given if isinstance(arg, Node) and arg.op == "get_attr"]
    return found
