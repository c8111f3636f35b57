"""What ranks of a distributed fit have seen of their own data, made one."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

__all__ = ["follow_first_rank", "share", "share_ranges"]


def follow_first_rank(network: nn.Module) -> None:
    """Give every rank the statistics and ranges of rank 0: one message for each kind of number.

    DDP does the same, but when the next forward pass begins, and not at all between batches whose gradients are
    accumulated. Until then ranks would round to integers of their own, and average gradients of different networks.
    An average over ranks would need every scale computed anew; rank 0's are moving averages over many batches anyway.

    Args:
        network: With buffers of the same shapes on every rank; the process group is initialised.
    """
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in network.buffers():
        if buffer.numel():
            kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        torch.distributed.broadcast(flat, src=0)
        for buffer, value in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(value.view_as(buffer))


def share_ranges(trainer: pl.Trainer, network: nn.Module) -> None:
    """Give every rank the ranges of rank 0.

    Args:
        trainer: In a fit.
        network: Prepared; the names of its ranges are the same on every rank.
    """
    share(trainer, {name: buffer for name, buffer in network.named_buffers() if "activation_post_process" in name})


def share(trainer: pl.Trainer, tensors: dict[str, Any]) -> None:
    """Give every rank the values that tensors have on rank 0, in place.

    Args:
        trainer: In a fit.
        tensors: By names that are the same on every rank.
    """
    for name, value in trainer.strategy.broadcast(tensors, src=0).items():
        tensors[name].data.copy_(value)
