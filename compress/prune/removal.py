"""How units go: at once or masked first, pushed towards zero before, statistics put right after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import RecipeError
from compress.prune.penalty import PENALTIES
from compress.surgery.slicing import Slices

__all__ = ["DIRECTIONS", "Removal", "doomed_slices", "push", "silence"]

DIRECTIONS = ("weight_v", "parametrizations.weight.original1")
"""The direction of a weight normalisation: its length at zero is enough, and a direction of length 0 divides by 0."""

_FORMS = ("hard", "soft")


@dataclass
class Removal:
    """How units go.

    Args:
        form: ``hard`` cuts them off at each edit; ``soft`` holds them at zero and cuts once, at the last edit.
        penalty: ``growing`` or ``group_lasso`` pushes doomed units towards zero before each edit; none by default.
        strength: Of the penalty, in units of the loss's gradient; it grows linearly to this.
        lead: Progress of the fit before an edit at which its units are chosen and the penalty sets in.
        recalibrate: Recent batches over which BatchNorm statistics are taken anew after each edit; 0 leaves them.

    Raises:
        RecipeError: when a value is out of range.
    """

    form: str = "hard"
    penalty: str | None = None
    strength: float = 0.01
    lead: float = 0.05
    recalibrate: int = 0

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise RecipeError(
                f"prune.removal.form: expected one of {', '.join(_FORMS)}, got {self.form!r}. Choose one."
            )
        if self.penalty is not None and self.penalty not in PENALTIES:
            raise RecipeError(
                f"prune.removal.penalty: expected one of {', '.join(PENALTIES)}, got {self.penalty!r}. Choose one."
            )
        if self.strength <= 0:
            raise RecipeError(f"prune.removal.strength: expected more than 0, got {self.strength}. Use 0.01, say.")
        if not 0 < self.lead < 1:
            raise RecipeError(f"prune.removal.lead: expected a value in (0, 1), got {self.lead}. Use 0.05, say.")
        if self.recalibrate < 0:
            raise RecipeError(f"prune.removal.recalibrate: expected 0 or more, got {self.recalibrate}. Use 8, say.")
        if self.form == "soft" and self.penalty is not None:
            raise RecipeError(
                "prune.removal.penalty: expected none with form: soft, got "
                f"{self.penalty!r}. Units that are held at zero need no push."
            )


Doomed = list[tuple[nn.Parameter, int, Tensor]]
"""Parameters, a dimension of each, and the indices along it that are to go."""


def doomed_slices(network: nn.Module, slices: Slices) -> Doomed:
    """Return what an edit will remove of each parameter; a normalised weight goes by its length.

    Args:
        network: Before the edit.
        slices: What it keeps.

    Example:
        >>> [(dim, indices) for _, dim, indices in doomed_slices(nn.Linear(2, 3), {"weight": {"0": [1]}})]
        [(0, tensor([0, 2]))]
    """
    found: Doomed = []
    parameters: Mapping[str, nn.Parameter] = dict(network.named_parameters())
    for name, dims in slices.items():
        if name in parameters:
            parameter = parameters[name]
            for dim, kept in dims.items():
                if dim == "0" and name.endswith(DIRECTIONS):
                    continue
                stays = torch.zeros(parameter.shape[int(dim)], dtype=torch.bool)
                stays[list(kept)] = True
                found.append((parameter, int(dim), (~stays).nonzero()[:, 0].to(parameter.device)))
    return found


@torch.no_grad()
def silence(doomed: Doomed) -> None:
    """Set what is to go to zero."""
    for parameter, dim, indices in doomed:
        parameter.index_fill_(dim, indices, 0.0)


@torch.no_grad()
def push(doomed: Doomed, penalty: str, strength: float) -> None:
    """Add the penalty's gradient to what is to go."""
    rule = PENALTIES[penalty]
    for parameter, dim, indices in doomed:
        if parameter.grad is None:
            continue
        chosen = parameter.index_select(dim, indices).movedim(dim, 0)
        force = rule(chosen.reshape(len(indices), -1), strength).reshape(chosen.shape).movedim(0, dim)
        parameter.grad.index_add_(dim, indices, force.to(parameter.grad.dtype))
