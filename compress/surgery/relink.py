"""After an edit: optimisers hold the new parameters with their old moments, and DDP sees the new shapes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import _init_optimizers_and_lr_schedulers
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.errors import EditError
from compress.surgery.slicing import Slices, slice_tensor

__all__ = ["check_strategy", "join_optimizers", "relink_optimizer", "relink_trainer"]

log = logging.getLogger(__name__)


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse a strategy under which parameters cannot change shape in mid-fit.

    Raises:
        EditError: for FSDP, DeepSpeed, model parallelism and others.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise EditError(
            f"trainer.strategy: expected a single device or ddp, got {type(trainer.strategy).__name__}. Sharded "
            "parameters cannot change shape in mid-fit. Prune the plain network in one shot before the fit, with "
            "compress.prune.plan_removal and apply_removal, and fit without the callback; or use strategy: ddp."
        )


def relink_optimizer(
    optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter], slices: Slices
) -> None:
    """Replace an optimiser's parameters by name and carry their state.

    The optimiser and its groups stay the same objects, so learning-rate schedulers go on. Parameters that were in the
    module's order end in the order of ``after``, which is the order a fresh optimiser would have: its state can be
    restored by index. Parameters that did not change keep their very state.

    Args:
        optimizer: Its groups hold parameters of ``before``.
        before: Parameters by name, before the edit.
        after: Parameters by name, after it.
        slices: What was kept of each parameter; state tensors of a parameter's shape are sliced alike.
    """
    names = {id(parameter): name for name, parameter in before.items()}
    changed = False
    for group in optimizer.param_groups:
        params: list[nn.Parameter] = []
        for old in group["params"]:
            name = names.get(id(old))
            new = after.get(name) if name is not None else old  # one that is not the module's is none of our business
            if new is not None:
                params.append(new)
            if new is old:
                continue
            changed = True
            state = optimizer.state.pop(old, None)
            if state is not None and new is not None:
                optimizer.state[new] = _carry(state, old, slices.get(str(name), {}))
        # In place: an optimiser may hold the list itself, as LBFGS does.
        group["params"][:] = _in_order(params, group["params"], before, after)
    if changed:
        _begin_anew(optimizer)


def join_optimizers(optimizers: Sequence[Optimizer], fresh: Sequence[Optimizer]) -> None:
    """Let parameters that an edit has added take part, in the groups and the order that a resumed fit will have.

    Args:
        optimizers: Those of the fit; they stay the same objects, with their state.
        fresh: What the module makes of its parameters now; thrown away afterwards.

    Raises:
        EditError: when the fresh optimisers have other groups.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    wanted = [group for optimizer in fresh for group in optimizer.param_groups]
    if len(groups) != len(wanted):
        raise EditError(
            f"configure_optimizers: expected the {len(groups)} groups of parameters that the fit began with, got "
            f"{len(wanted)}. Make the same groups whenever it is called, empty ones included."
        )
    known = {id(parameter) for group in groups for parameter in group["params"]}
    for group, like in zip(groups, wanted):
        new = [parameter for parameter in like["params"] if id(parameter) not in known]
        joined = [*group["params"], *new]
        same = {id(parameter) for parameter in joined} == {id(parameter) for parameter in like["params"]}
        group["params"][:] = like["params"] if same else joined
    for optimizer in optimizers:
        _begin_anew(optimizer)


def _begin_anew(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):  # its directions are vectors over all parameters
        optimizer.state.clear()
        optimizer._numel_cache = None


def _in_order(
    new: list[nn.Parameter],
    old: list[nn.Parameter],
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
) -> list[nn.Parameter]:
    """Order parameters as ``after`` does if they were in the order of ``before``; a user's own order stays."""
    positions = {id(parameter): position for position, parameter in enumerate(before.values())}
    given = [positions.get(id(parameter), -1) for parameter in old]
    if -1 in given or given != sorted(given):
        return new
    order = {id(parameter): position for position, parameter in enumerate(after.values())}
    return sorted(new, key=lambda parameter: order[id(parameter)])


def _carry(state: Mapping[str, Any], old: Tensor, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a parameter's state cut along, or an empty one where something in it has a form of its own."""
    if not kept:
        return dict(state)
    carried = {}
    for key, value in state.items():
        if not torch.is_tensor(value):
            carried[key] = value
        elif value.dim() == old.dim() and all(a in (b, 1) for a, b in zip(value.shape, old.shape)):
            # Of the parameter's shape, or reduced over some dimensions, as Adafactor's moments.
            carried[key] = slice_tensor(value, {d: k for d, k in kept.items() if value.shape[int(d)] > 1})
        elif value.numel() == 1:
            carried[key] = value
        else:
            log.warning("edit: the optimiser's %s has a form of its own and begins anew for a parameter", key)
            return {}
    return carried


def relink_trainer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, before: Mapping[str, nn.Parameter], slices: Slices
) -> None:
    """Re-link everything of a Trainer that holds parameters of the module: optimisers and DDP.

    Parameters that the edit has added join the optimisers where ``configure_optimizers`` would put them.

    Args:
        trainer: In the middle of a fit.
        pl_module: After the edit.
        before: ``dict(pl_module.named_parameters())`` from before the edit.
        slices: What was kept, by the names of ``before``.
    """
    after = dict(pl_module.named_parameters())
    for optimizer in trainer.optimizers:
        relink_optimizer(optimizer, before, after, slices)
    if after.keys() - before.keys():
        join_optimizers(trainer.optimizers, _init_optimizers_and_lr_schedulers(pl_module)[0])
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        # A reducer's buckets are laid out for the old shapes: wrap the bare module again.
        strategy.model = pl_module
        strategy.configure_ddp()
