"""What the units of a group hold of each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.errors import EditError
from compress.prune.anatomy import Anatomy
from compress.prune.coupling import Group
from compress.prune.criteria.gradients import Gradients
from compress.prune.criteria.roles import JOINS, roles_of

__all__ = ["Member", "members", "with_role"]


@dataclass(frozen=True)
class Member:
    """What the units of a group hold of one parameter.

    Args:
        name: The parameter.
        dim: Along which of its dimensions the units lie.
        weight: Shape (units, elements), float32.
        role: What the parameter does for them: ``"makes"``, ``"reads"``, ``"scales"`` or ``"joins"`` (see ``roles``).
        product: Mean of w g over optimiser steps, of the same shape, where there were gradients.
        square: Mean of g g, likewise.
    """

    name: str
    dim: int
    weight: Tensor
    role: str = JOINS
    product: Tensor | None = None
    square: Tensor | None = None


def members(
    anatomy: Anatomy,
    group: Group,
    *,
    roles: Mapping[tuple[str, int], str] | None = None,
    gradients: Gradients | None = None,
) -> list[Member]:
    """Return what a group's units hold, parameter by parameter.

    Args:
        anatomy: The network.
        group: One of its groups.
        roles: ``roles_of(anatomy.graph)``, where it is at hand.
        gradients: Of the same network.

    Raises:
        EditError: when the gradients are those of another network.
    """
    roles = roles_of(anatomy.graph) if roles is None else roles
    # Tied parameters go by the first of their names, which module and graph may not agree on.
    parameters = dict(anatomy.network.named_parameters(remove_duplicate=False))
    listed = {id(parameter): name for name, parameter in anatomy.network.named_parameters()}
    found = []
    for (name, dim), indices in group.slots.items():
        if name not in parameters:
            continue
        parameter = parameters[name].detach()

        def slices(tensor: Tensor, dim: int = dim, indices: Tensor = indices) -> Tensor:
            lines = tensor.float().movedim(dim, 0)
            return lines.reshape(len(lines), -1)[indices.to(lines.device)].flatten(1)

        means: list[Tensor | None] = [None, None]
        if gradients is not None:
            for position, sums in enumerate((gradients.products, gradients.squares)):
                total = sums.get(listed[id(parameters[name])])
                if total is not None:
                    _check_shape(name, total, parameter)
                    means[position] = slices(total / gradients.count)
        found.append(Member(name, dim, slices(parameter), roles.get((name, dim), JOINS), *means))
    return found


def with_role(group: Sequence[Member], role: str) -> list[Member]:
    """Return the members with a role, or all of them where none has it."""
    return [member for member in group if member.role == role] or list(group)


def _check_shape(name: str, total: Tensor, parameter: Tensor) -> None:
    if total.shape != parameter.shape:
        raise EditError(
            f"prune.gradients: expected {name} of shape {tuple(parameter.shape)}, got {tuple(total.shape)}. "
            "Call reset() after an edit."
        )
