"""Whether all processes of a fit hold the same parameters: compared by checksums, a few numbers for each tensor."""

from __future__ import annotations

import zlib

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from compress.errors import EditError

__all__ = ["check_ranks", "checksum"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """Return a number that changes with any one bit of a tensor, and hardly ever stays when its elements are permuted.

    Args:
        tensor: Any shape and type.

    Returns:
        Scalar int64, on the tensor's device: the bits as integers, weighted by odd numbers, summed modulo 2^64.

    Example:
        >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
        tensor(False)
        >>> checksum(torch.tensor([0.0])) == checksum(torch.tensor([-0.0]))
        tensor(False)
    """
    flat = tensor.detach().contiguous().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    bits = flat.view(_BITS[flat.element_size()]).long()
    # Odd, so that the highest bit of 64 is not shifted out.
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()


def check_ranks(trainer: pl.Trainer, module: nn.Module) -> None:
    """Make sure that parameters are bit-equal on all ranks.

    Buffers are left out: under DDP each rank has statistics of its own until rank 0's are sent around.

    Args:
        trainer: Its strategy joins the ranks; with one process there is nothing to compare.
        module: The same on every rank, in theory.

    Raises:
        EditError: on every rank, naming the first parameter that differs.
    """
    if trainer.world_size == 1:
        return
    device = trainer.strategy.root_device
    parameters = dict(module.named_parameters())
    layout = zlib.crc32(repr([(name, tuple(p.shape), p.dtype) for name, p in parameters.items()]).encode())
    if not _alike(trainer, torch.tensor([layout], device=device)).all():
        raise EditError(
            "edit: expected layers of the same names and shapes on all ranks, got different ones. "
            "Build the network alike on every rank."
        )
    alike = _alike(trainer, torch.stack([checksum(parameter).to(device) for parameter in parameters.values()]))
    if not alike.all():
        first = list(parameters)[int(alike.logical_not().nonzero()[0])]
        raise EditError(
            f"edit: expected the same values on all ranks, got different ones in {first}. "
            "Something trains the ranks apart: look for parameters that DDP does not reduce."
        )


def _alike(trainer: pl.Trainer, numbers: Tensor) -> Tensor:
    everyone = trainer.strategy.all_gather(numbers)
    return (everyone == everyone[0]).all(dim=0)
