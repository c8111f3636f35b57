"""What gradients have said of each weight over the optimiser steps since the last edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import EditError

__all__ = ["Gradients"]


class Gradients:
    """Sums of w g and of g g over optimiser steps, element by element.

    They are kept in float32 or better, beside the parameters: twice the memory of the weights.

    Attributes:
        products: Sum of w g, by parameter, of its shape.
        squares: Sum of g g, likewise.
        count: Steps that went in. A parameter without a gradient in a step counts as one with a gradient of zero.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 3.0)
        >>> layer(torch.tensor([[1.0, 2.0]])).backward()
        >>> gradients = Gradients()
        >>> gradients.update(layer)
        >>> gradients.products["weight"], gradients.squares["weight"], gradients.count
        (tensor([[3., 6.]]), tensor([[1., 4.]]), 1)
    """

    def __init__(self) -> None:
        self.products: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Add the gradients that an optimiser step is about to use.

        A step with a gradient that is infinite or no number is left out: under mixed precision the optimiser leaves
        it out, too.

        Raises:
            EditError: when a parameter has another shape than before.
        """
        named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.grad is not None]
        if not named:
            return
        grads = [_dense(parameter.grad) for _, parameter in named]  # type: ignore[arg-type]
        if not all(bool(norm.isfinite()) for norm in _total_norms(grads)):
            return
        weights = [parameter.to(grad.dtype) for (_, parameter), grad in zip(named, grads)]
        products = [self._sum(self.products, name, grad) for (name, _), grad in zip(named, grads)]
        squares = [self._sum(self.squares, name, grad) for (name, _), grad in zip(named, grads)]
        torch._foreach_addcmul_(products, weights, grads)
        torch._foreach_addcmul_(squares, grads, grads)
        self.count += 1

    def reset(self) -> None:
        """Forget everything, as after an edit."""
        self.products, self.squares, self.count = {}, {}, 0

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and a number, for a checkpoint that loads with ``weights_only=True``."""
        return {"products": dict(self.products), "squares": dict(self.squares), "count": self.count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave; the sums move to the parameters' device at the next update."""
        self.products = {name: tensor.clone() for name, tensor in state_dict["products"].items()}
        self.squares = {name: tensor.clone() for name, tensor in state_dict["squares"].items()}
        self.count = int(state_dict["count"])

    def all_reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their means over all ranks, in one call.

        Args:
            reduce: Returns the mean over ranks of a tensor of shape (n,). Every rank must have seen the same
                parameters and as many steps.
        """
        tensors = [sums[name] for sums in (self.products, self.squares) for name in sorted(sums)]
        if not tensors:
            return
        joined = reduce(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, mean in zip(tensors, joined.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))

    def _sum(self, sums: dict[str, Tensor], name: str, grad: Tensor) -> Tensor:
        known = sums.get(name)
        if known is None:
            known = torch.zeros_like(grad)
        elif known.shape != grad.shape:
            raise EditError(
                f"prune.gradients: expected {name} of shape {tuple(known.shape)}, got {tuple(grad.shape)}. "
                "Call reset() after an edit."
            )
        sums[name] = known.to(grad.device)
        return sums[name]


def _dense(grad: Tensor) -> Tensor:
    """Return a gradient in full precision, all of its elements."""
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def _total_norms(grads: list[Tensor]) -> list[Tensor]:
    """Return the norm of all gradients of each device."""
    norms: dict[torch.device, list[Tensor]] = {}
    for norm in torch._foreach_norm(grads):
        norms.setdefault(norm.device, []).append(norm.double())
    return [torch.stack(own).sum() for own in norms.values()]
