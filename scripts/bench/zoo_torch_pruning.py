"""The zoo pruned by Torch-Pruning, with the calls that suit it best, each tried until one passes.

Whole heads and channels; the width of heads and channels; channels alone. Layers of the output are ignored, and
attributes follow the shapes afterwards as they do for ours: what its examples do by hand for each model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch_pruning as tp
from limit import OutOfTimeError, processor_time
from torch import nn
from zoo_models import build, first_output, size
from zoo_prune import RATIO, train_a_step

from compress.prune.attributes import attribute_candidates

__all__ = ["LIMIT_S", "output_layers", "prune_by_torch_pruning"]

LIMIT_S = 60.0
"""Seconds of processor time for all calls together."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_READERS = ("qkv", "q", "k", "v", "kv", "query", "key", "value", *(f"{x}_{y}" for x in "qkv" for y in ("lin", "proj")))
_READERS += ("query_proj", "key_proj", "value_proj")
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def prune_by_torch_pruning(name: str, row: dict[str, Any]) -> None:
    """Remove 30 % by Torch-Pruning, then forward, backward and a step of the optimiser.

    Args:
        name: Of the architecture.
        row: Gets the figures; seconds are those of the processor.

    Raises:
        Exception: why the last of its calls failed.
    """
    network, inputs = build(name)
    reasons = {}
    try:
        with processor_time(LIMIT_S):
            for call, arguments in _calls(network).items():
                if not (reason := _try(network, inputs, call, arguments, row)):
                    return
                reasons[call] = reason
    except OutOfTimeError as error:
        reasons["time"] = str(error)
    row["reasons"] = reasons
    raise RuntimeError(list(reasons.values())[-1])


def _try(network: nn.Module, inputs: Any, call: str, arguments: Mapping[str, Any], row: dict[str, Any]) -> str | None:
    """Return why a call fails, if it does; the next one may do better."""
    started = time.process_time()
    try:
        twin = _removed(network, inputs, arguments)
        row |= {"tp_s": time.process_time() - started, "call": call, "left": size(twin) / size(network)}
        assert row["left"] < 1, "nothing was removed, without an error"
        train_a_step(twin, inputs)
    except Exception as error:  # its tracer and its edits fail in many ways
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


def output_layers(network: nn.Module, inputs: Any) -> list[nn.Module]:
    """Return the layers that are as wide as the output: those that make it."""
    with torch.no_grad():
        shape = first_output(network(*inputs)).shape
    widths = {shape[-1]} if len(shape) < 4 else {shape[1]}
    return [
        module
        for module in network.modules()
        if isinstance(module, _LAYERS) and module.weight.shape[0] in widths and module.weight.shape[0] > 1
    ]


def _calls(network: nn.Module) -> dict[str, dict[str, Any]]:
    heads = {"heads": True} if dict(_attention(network)) else {}
    calls: dict[str, dict[str, Any]] = {}
    if heads:
        whole = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": RATIO}
        calls["whole heads"] = {**heads, **whole}
        calls["width of heads"] = {**heads, "prune_num_heads": False, "prune_head_dims": True}
    multiples = [module.num_heads for module in network.modules() if isinstance(module, nn.MultiheadAttention)]
    if multiples:
        calls["multiples of heads"] = {"round_to": max(multiples)}
    return {**calls, "channels": {}}


def _attention(network: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield names of layers that make queries, keys and values, and the number of their heads."""
    for name, module in network.named_modules():
        owner = next((o for o in (module, getattr(module, "config", None)) for h in _HEADS if hasattr(o, h)), None)
        heads = next((getattr(owner, h) for h in _HEADS if hasattr(owner, h)), 1) if owner is not None else 1
        if not isinstance(heads, int) or heads < 2:
            continue
        for child, layer in module.named_children():
            if child in _READERS and isinstance(layer, nn.Linear):
                keys = getattr(owner, "num_key_value_heads", None) or heads
                yield f"{name}.{child}".lstrip("."), keys if child[0] in "kv" and child != "kv" else heads


def _removed(network: nn.Module, inputs: Any, arguments: Mapping[str, Any]) -> nn.Module:
    twin = copy.deepcopy(network)
    arguments = dict(arguments)
    heads = {}
    if arguments.pop("heads", False):
        heads = {twin.get_submodule(name): number for name, number in _attention(twin)}
    before = {name: tuple(parameter.shape) for name, parameter in twin.named_parameters()}
    # A fresh container each time: Torch-Pruning changes the dicts and lists it is given.
    pruner = tp.pruner.BasePruner(
        twin,
        example_inputs=tuple(inputs),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=output_layers(twin, inputs),
        num_heads=heads,
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
        **arguments,
    )
    pruner.step()
    for module in twin.modules():
        _follow_heads(module, pruner.num_heads)
    with torch.no_grad():
        try:
            twin(*inputs)
        except Exception:  # sizes in attributes
            for owner, values in attribute_candidates(twin, _changed(before, twin)).items():
                for key, value in values.items():
                    setattr(twin.get_submodule(owner), key, value)
            twin(*inputs)
    return twin


def _follow_heads(module: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    """Set the attributes of an attention layer from the layers that make its queries."""
    for child, layer in module.named_children():
        if layer not in heads or child[0] != "q":
            continue
        width = layer.weight.shape[0] // (3 if child == "qkv" else 1)
        given: dict[str, Callable[[], int]] = {
            **dict.fromkeys(_HEADS, lambda layer=layer: heads[layer]),
            "head_dim": lambda layer=layer, width=width: width // heads[layer],
            "attention_head_size": lambda layer=layer, width=width: width // heads[layer],
            "all_head_size": lambda width=width: width,
            "attn_dim": lambda width=width: width,
        }
        for key, value in given.items():
            if isinstance(getattr(module, key, None), int):
                setattr(module, key, value())


def _changed(before: Mapping[str, tuple[int, ...]], network: nn.Module) -> dict[str, dict[int, int]]:
    """Return old and new sizes of what changed in or below each module."""
    changes: dict[str, dict[int, int]] = {}
    for name, parameter in network.named_parameters():
        for old, new in zip(before.get(name, ()), parameter.shape):
            owner = name.rpartition(".")[0]
            while old != new:
                changes.setdefault(owner, {}).setdefault(old, new)
                if not owner:
                    break
                owner = owner.rpartition(".")[0]
    return changes
