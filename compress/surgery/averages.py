"""Averages of a network's weights (EMA, SWA) follow its edits.

A callback such as Lightning's ``WeightAveraging`` or ``StochasticWeightAveraging`` holds a copy of the whole
LightningModule, a user's own code an ``AveragedModel`` of the network. Copies are recognised by what they are, not by
who holds them; after an edit each is the edited network with the average's own values, cut along.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from compress.errors import EditError
from compress.surgery.compiled import original, successor
from compress.surgery.slicing import Slices, slice_tensor

__all__ = ["Average", "after_averages", "find_averages"]


@dataclass(frozen=True)
class Average:
    """A copy of a network that holds an average of its weights.

    Args:
        owner: The module that has the copy.
        attribute: Its attribute for it.
        prefix: Before the names of the copy's parameters in the LightningModule, when it is a part of that.
        averaged: What computes the average, where PyTorch's class does.
    """

    owner: nn.Module
    attribute: str
    prefix: str | None
    averaged: AveragedModel | None

    def follow(self, edited: nn.Module, slices: Slices) -> None:
        """Give the copy the structure of the edited network.

        Args:
            edited: The network after the edit.
            slices: What was kept, by the names of the network's tensors.
        """
        holder = getattr(self.owner, self.attribute)
        old = original(holder)
        new = copy.deepcopy(edited).to(next(old.parameters()).device)
        modes, values = {name: module.training for name, module in old.named_modules()}, _tensors(old)
        for name, module in new.named_modules():
            module.training = modes.get(name, old.training)
        with torch.no_grad():
            for name, tensor in _tensors(new).items():
                if name in values:
                    tensor.copy_(slice_tensor(values[name], slices.get(name, {})))
                    tensor.requires_grad_(values[name].requires_grad)
        if self.averaged is not None:
            _share_ranges(new, edited, self.averaged)
        setattr(self.owner, self.attribute, successor(self.owner, holder, new))

    def take(self, network: nn.Module) -> None:
        """Give the copy the values of the network, which was changed after it had become the average.

        Args:
            network: Of the copy's structure.
        """
        values = _tensors(original(getattr(self.owner, self.attribute)))
        with torch.no_grad():
            for name, tensor in _tensors(network).items():
                if name in values and values[name].data_ptr() != tensor.data_ptr():
                    values[name].data.resize_(tensor.shape).copy_(tensor)  # of a fake quantizer, steps may be more now


def find_averages(trainer: pl.Trainer, pl_module: pl.LightningModule, attribute: str) -> list[Average]:
    """Find the copies of a module's network that average its weights.

    Args:
        trainer: Its callbacks are looked through.
        pl_module: Before an edit.
        attribute: Name of the attribute that holds the network.

    Raises:
        EditError: when a callback's copy of the module has other layers than the module.
    """
    network = original(getattr(pl_module, attribute))
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for value in vars(callback).values():
            averaged = value if isinstance(value, AveragedModel) else None
            twin: Any = value.module if averaged is not None else value
            if isinstance(twin, type(pl_module)) and twin is not pl_module:
                _check_alike(type(callback).__name__, pl_module, twin)
                found.append(Average(twin, attribute, None, averaged))
            elif averaged is not None and _layout(original(twin)) == _layout(network):
                found.append(Average(averaged, "module", None, averaged))
    return [*found, *_inside(pl_module, network)]


def after_averages(callback: pl.Callback, callbacks: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Return callbacks in an order in which one comes after the averages that end a fit.

    It is a new list: Lightning may be on its way through the other.

    Args:
        callback: One of ``callbacks``.
        callbacks: The Trainer's.
    """
    last = max(
        place
        for place, other in enumerate(callbacks)
        if other is callback or isinstance(other, WeightAveraging | StochasticWeightAveraging)
    )
    before = [other for other in callbacks[: last + 1] if other is not callback]
    return [*before, callback, *callbacks[last + 1 :]]


def _inside(pl_module: pl.LightningModule, network: nn.Module) -> Iterator[Average]:
    for name, module in pl_module.named_modules():
        if isinstance(module, AveragedModel) and _layout(original(module.module)) == _layout(network):
            yield Average(module, "module", f"{name}.module.", module)


def _check_alike(callback: str, pl_module: pl.LightningModule, twin: nn.Module) -> None:
    ours, theirs = _layout(pl_module), _layout(twin)
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        raise EditError(
            f"{callback}: expected a copy of {type(pl_module).__name__} with the same layers, got a difference in "
            f"{differing[0]}. Make all layers in __init__: averaging callbacks copy the module before its own setup."
        )


def _layout(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _share_ranges(new: nn.Module, edited: nn.Module, averaged: AveragedModel) -> None:
    """Let the average use the very fake quantizers of the network: an average of a zero point or a switch is none."""
    shared = False
    for name, module in list(edited.named_modules(remove_duplicate=False)):  # one may stand under several names
        if hasattr(module, "fake_quant_enabled"):
            new.set_submodule(name, module)
            shared = True
    if not shared:
        return
    if averaged.multi_avg_fn is not None:
        many = averaged.multi_avg_fn

        def average_others(averages: Any, currents: Any, num_averaged: Any) -> None:
            pairs = [(a, c) for a, c in zip(averages, currents) if a.data_ptr() != c.data_ptr()]
            if pairs:
                many([a for a, _ in pairs], [c for _, c in pairs], num_averaged)

        averaged.multi_avg_fn = average_others
    else:
        one = averaged.avg_fn or get_swa_avg_fn()
        averaged.avg_fn = lambda a, c, num: c if a.data_ptr() == c.data_ptr() else one(a, c, num)
