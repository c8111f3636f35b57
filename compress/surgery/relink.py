"""After an edit: optimisers hold the new parameters with their old moments, and DDP sees the new shapes."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.optim import Optimizer

from compress.errors import EditError
from compress.surgery.slicing import Slices, slice_tensor

__all__ = ["check_strategy", "relink_optimizer", "relink_trainer"]


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse a strategy under which parameters cannot change shape in mid-fit.

    Raises:
        EditError: for FSDP, DeepSpeed, model parallelism and others.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise EditError(
            f"trainer.strategy: expected a single device or ddp, got {type(trainer.strategy).__name__}. "
            "Sharded parameters cannot change shape in mid-fit: prune before the fit, or use strategy: ddp."
        )


def relink_optimizer(
    optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter], slices: Slices
) -> None:
    """Replace an optimiser's parameters by name and carry their state.

    The optimiser and its groups stay the same objects, so learning-rate schedulers go on. The parameters of a group
    end in the order of ``after``, which is the order a fresh optimiser would have: its state can be restored by index.

    Args:
        optimizer: Its groups hold parameters of ``before``.
        before: Parameters by name, before the edit.
        after: Parameters by name, after it.
        slices: What was kept of each parameter; state tensors of a parameter's shape are sliced alike.
    """
    names = {id(parameter): name for name, parameter in before.items()}
    order = {name: position for position, name in enumerate(after)}
    for group in optimizer.param_groups:
        kept: list[tuple[int, nn.Parameter]] = []
        for old in group["params"]:
            name = names.get(id(old))
            state = optimizer.state.pop(old, None)
            if name is None or name not in after:
                continue
            new = after[name]
            if state is not None:
                optimizer.state[new] = {
                    key: slice_tensor(value, slices.get(name, {}))
                    if torch.is_tensor(value) and value.shape == old.shape
                    else value
                    for key, value in state.items()
                }
            kept.append((order[name], new))
        group["params"] = [parameter for _, parameter in sorted(kept, key=lambda pair: pair[0])]


def relink_trainer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, before: Mapping[str, nn.Parameter], slices: Slices
) -> None:
    """Re-link everything of a Trainer that holds parameters of the module: optimisers and DDP.

    Args:
        trainer: In the middle of a fit.
        pl_module: After the edit.
        before: ``dict(pl_module.named_parameters())`` from before the edit.
        slices: What was kept, by the names of ``before``.
    """
    after = dict(pl_module.named_parameters())
    for optimizer in trainer.optimizers:
        relink_optimizer(optimizer, before, after, slices)
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        # A reducer's buckets are laid out for the old shapes: wrap the bare module again.
        strategy.model = pl_module
        strategy.configure_ddp()
