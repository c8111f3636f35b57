"""A network that teaches: frozen, in eval mode, without gradient, as fast as it can be run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress.distill.teachers.ensemble import Ensemble
from compress.errors import DataError, RecipeError

__all__ = ["LiveTeacher", "check_finite", "freeze", "not_finite"]

Network = TypeVar("Network", bound=nn.Module)

_PRECISIONS = (None, "bf16", "fp32")
_HEAVY = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def freeze(network: Network) -> Network:
    """Put a network into eval mode and take the gradients of its parameters away, in place.

    Example:
        >>> any(parameter.requires_grad for parameter in freeze(nn.Linear(2, 2)).parameters())
        False
    """
    return network.eval().requires_grad_(False)


class LiveTeacher:
    """Runs a frozen network on every batch; it is no module, so nothing saves, optimises or moves it by accident.

    Args:
        network: The teacher; an ``Ensemble`` gives one answer for each member.
        precision: ``"bf16"`` (its convolutions and linear layers are cast once, on a copy), ``"fp32"``, or that of
            whoever calls.
        compile: Whether ``torch.compile`` makes it faster.
        channels_last: Give it images in channels-last memory format.

    Raises:
        RecipeError: when the precision is unknown.

    Example:
        >>> teacher = LiveTeacher(nn.Linear(4, 2), precision="bf16")
        >>> teacher(torch.zeros(3, 4)).requires_grad
        False
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        precision: str | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        if precision not in _PRECISIONS:
            raise RecipeError(
                f"teacher.precision: expected bf16 or fp32, got {precision!r}. Leave it out for the Trainer's."
            )
        if precision == "bf16":
            network = copy.deepcopy(network)
            for module in network.modules():
                if type(module) in _HEAVY:
                    module.to(torch.bfloat16)
        if channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = freeze(network)
        self.precision = precision
        self.channels_last = channels_last
        if compile:
            for member in network.teachers if isinstance(network, Ensemble) else [network]:
                member.compile()

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Return the network's outputs in float32 where it answers in less; of an ``Ensemble``, a list of them."""
        if self.channels_last:
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        call = self.network.each if isinstance(self.network, Ensemble) else self.network
        with torch.no_grad():
            if self.precision is None:
                return call(*inputs, **named)
            device = (inputs or tuple(named.values()))[0].device.type
            with torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                return call(*inputs, **named)

    def to(self, device: torch.device) -> None:
        """Move the network."""
        self.network.to(device)


def not_finite(outputs: Any) -> Tensor:
    """Return, without waiting for a device, whether anything in nested outputs is NaN or infinite."""
    flags = [~torch.isfinite(tensor).all() for tensor in _tensors(outputs) if tensor.is_floating_point()]
    return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool)


def check_finite(outputs: Any) -> None:
    """Refuse a teacher's answers that are NaN or infinite.

    Raises:
        DataError: naming how many values are wrong.
    """
    if not not_finite(outputs):
        return
    tensors = [tensor for tensor in _tensors(outputs) if tensor.is_floating_point()]
    wrong = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
    raise DataError(
        f"teacher: expected finite outputs, got {wrong} of {sum(map(Tensor.numel, tensors))} values that are NaN or "
        "infinite. Check the teacher's weights and whether its inputs are scaled as in its own training; with "
        "teacher.precision bf16 try fp32."
    )


def _tensors(outputs: Any) -> Iterable[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
        return
    for entry in outputs.values() if isinstance(outputs, Mapping) else outputs:
        yield from _tensors(entry)
