"""Iterative structured pruning as a Lightning callback."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from compress.errors import EditError, RecipeError
from compress.prune.anatomy import study
from compress.prune.criteria import score_groups
from compress.prune.planner import apply_removal, describe_removal, least
from compress.prune.schedules import SCHEDULES, num_kept
from compress.surgery import Edit, History, ModelEditor, history_of
from compress.surgery.editor import example_inputs, progress

__all__ = ["StructuredPruning", "replay_prune"]

log = logging.getLogger(__name__)


def replay_prune(network: nn.Module, edit: Edit) -> nn.Module:
    """Carry out an edit of kind ``"prune"``."""
    return apply_removal(network, edit.data)


class StructuredPruning(ModelEditor):
    """Remove whole channels during a fit, a few at a time, on any LightningModule.

    What belongs together is read off the exported graph (channels, attention heads, recurrent units) and ranked by
    group L2 norm; each removal is physical, an ``Edit`` in the ``History``, and the optimiser's moments are sliced
    along. A network whose code has sizes written in goes on as its captured graph.

    Args:
        ratio: Fraction of each layer's channels removed in the end, in [0, 1).
        schedule: How the removals spread over the edits: ``cubic``, ``linear`` or ``one_shot``.
        start: Progress of the fit at the first edit, in [0, 1).
        end: Progress at the last edit.
        num_edits: How many times channels are removed.
        round_to: Widths are rounded to a multiple of it.
        criterion: What says how much a unit matters.
        ignore: Names of layers whose outputs stay. The network's output layers stay in any case.
        attribute: Name of the LightningModule's attribute that holds the network.

    Raises:
        RecipeError: when a value is out of range.
    """

    kind = "prune"

    def __init__(
        self,
        ratio: float = 0.5,
        *,
        schedule: str = "cubic",
        start: float = 0.1,
        end: float = 0.5,
        num_edits: int = 5,
        round_to: int = 8,
        criterion: str = "l2",
        ignore: Sequence[str] = (),
        attribute: str = "student",
    ) -> None:
        super().__init__(attribute)
        if not 0 <= ratio < 1:
            raise RecipeError(
                f"prune.ratio: expected a value in [0, 1), got {ratio}. Use 0.5 to remove half of the channels."
            )
        if schedule not in SCHEDULES:
            raise RecipeError(f"prune.schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}. Choose one.")
        if not 0 <= start <= end < 1:
            raise RecipeError(
                f"prune.start, prune.end: expected 0 <= start <= end < 1, got {start} and {end}. "
                "Leave time after the end for recovery."
            )
        for name, value in [("num_edits", num_edits), ("round_to", round_to)]:
            if value < 1:
                raise RecipeError(f"prune.{name}: expected at least 1, got {value}. Use 1 or more.")
        self.ratio = ratio
        self.schedule = schedule
        self.start = start
        self.end = end
        self.num_edits = 1 if schedule == "one_shot" else num_edits
        self.round_to = round_to
        self.criterion = criterion
        self.ignore = tuple(ignore)
        self._done = 0

    def apply(self, network: nn.Module, edit: Edit) -> nn.Module:
        """Remove what the edit does not keep."""
        return replay_prune(network, edit)

    def state_dict(self) -> dict[str, Any]:
        """Return how many edits of the schedule are behind."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self._done = state_dict["done"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remove channels when an edit is due and no gradients are under accumulation."""
        if self._done == self.num_edits or self.ratio == 0 or batch_idx % trainer.accumulate_grad_batches:
            return
        due = self._num_due(progress(trainer))
        if due == self._done:
            return
        ratio = self.ratio * SCHEDULES[self.schedule](due / self.num_edits)
        inputs = example_inputs(pl_module, batch)
        self.edit(trainer, pl_module, lambda: self._plan(self.network(pl_module), inputs, ratio, history_of(pl_module)))
        self._done = due
        if due == self.num_edits and not history_of(pl_module).count(self.kind):
            raise EditError(
                f"prune: expected something to remove at ratio {self.ratio}, got nothing: no group of channels in "
                f"{type(self.network(pl_module)).__name__} is wider than {self.round_to} and unprotected. "
                "Lower prune.round_to, shorten prune.ignore, or leave prune out."
            )

    def _num_due(self, now: float) -> int:
        gap = (self.end - self.start) / max(1, self.num_edits - 1)
        # The tolerance keeps an edit at, say, 0.3 from slipping a step by rounding.
        return sum(now >= self.start + index * gap - 1e-9 for index in range(self.num_edits))

    def _plan(self, network: nn.Module, inputs: Sequence[Tensor], ratio: float, history: History) -> Edit | None:
        original: dict[str, int] = {}
        for edit in history:
            for name, (before, _) in edit.data.get("widths", {}).items():
                original.setdefault(name, before)
        anatomy = study(network, inputs, ignore=self.ignore)
        keep = {
            name: num_kept(original.get(name, width), ratio=ratio, round_to=self.round_to)
            for name, width in anatomy.widths.items()
        }
        data = describe_removal(anatomy, least(score_groups(anatomy, self.criterion), keep))
        if data is None:
            return None
        edit = Edit(self.kind, data)
        _check_shapes(network, edit, inputs)
        log.info("pruned: %s", ", ".join(f"{name} {old}->{new}" for name, (old, new) in data["widths"].items()))
        return edit


def _check_shapes(network: nn.Module, edit: Edit, inputs: Sequence[Tensor]) -> None:
    """Run the edit on a copy before it is applied anywhere."""
    twin = copy.deepcopy(network).eval()
    with torch.no_grad():
        before = twin(*inputs)
        try:
            after = replay_prune(twin, edit)(*inputs)
        except Exception as error:  # a size written into the network's code; any kind of exception
            raise EditError(
                f"prune: expected {type(network).__name__} to run with {', '.join(edit.data['widths'])} narrower, got "
                f"{type(error).__name__}: {error}. Name the layers to leave alone in prune.ignore."
            ) from error
    if isinstance(before, Tensor) and before.shape != after.shape:
        raise EditError(
            f"prune: expected outputs of shape {tuple(before.shape)}, got {tuple(after.shape)}. "
            "Name the output layers in prune.ignore."
        )
