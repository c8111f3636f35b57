"""Iterative structured pruning as a Lightning callback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.errors import EditError, RecipeError
from compress.prune.allocation import ALLOCATIONS, Target
from compress.prune.anatomy import Anatomy, study
from compress.prune.blocks import find_blocks
from compress.prune.choice import Wishes, choose_blocks, choose_units, describe
from compress.prune.criteria import CRITERIA
from compress.prune.observations import Observations, Witness
from compress.prune.planner import replay_prune
from compress.prune.recalibrate import recalibrate
from compress.prune.removal import Doomed, Removal, doomed_slices, push, silence
from compress.prune.schedules import Timetable, last_point, timetable
from compress.surgery import Edit, History, ModelEditor, history_of
from compress.surgery.editor import example_inputs, progress, whole_inputs
from compress.surgery.samples import blaming_samples
from compress.surgery.timeline import length

__all__ = ["StructuredPruning"]

log = logging.getLogger(__name__)


class StructuredPruning(ModelEditor):
    """Remove channels, heads, recurrent units and whole blocks during a fit, on any LightningModule.

    What belongs together is read off the exported graph; each removal is physical, an ``Edit`` in the ``History``, and
    the optimiser's moments are sliced along. A network whose code has sizes written in goes on as its captured graph.

    Args:
        ratio: Fraction of the units removed in the end, in [0, 1); without a target.
        target: What the network may cost in the end, instead of a ratio: ``latency_ms``, ``macs``, ``params`` or
            ``bytes``; up to 1 a fraction of what it costs now.
        allocation: How removal spreads over layers: ``uniform``, ``global`` or ``sensitivity``.
        criterion: What says how much a unit matters, one of ``CRITERIA``.
        depth: Fraction of the residual blocks or transformer layers removed in the end, those that change least.
        heads: ``whole`` removes attention heads; ``width`` narrows all heads alike.
        schedule: How removal spreads over the edits: ``cubic``, ``linear``, ``cosine``, ``one_shot``, or points
            ``[progress, fraction]``.
        start: Progress of the fit at the first edit, in [0, 1).
        end: Progress at the last edit; the rest is recovery.
        num_edits: How many times units are removed, or how often: ``"200 steps"``, ``"2 epochs"``.
        round_to: Widths are rounded to a multiple of it.
        min_width: Least units of a layer that stay.
        removal: How units go: at once or masked first, pushed towards zero before, statistics put right after.
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
        target: Target | None = None,
        allocation: str = "uniform",
        criterion: str = "l2",
        depth: float = 0.0,
        heads: str = "whole",
        schedule: str | list[list[float]] = "cubic",
        start: float = 0.1,
        end: float = 0.5,
        num_edits: int | str = 5,
        round_to: int = 8,
        min_width: int = 1,
        removal: Removal | None = None,
        ignore: Sequence[str] = (),
        attribute: str = "student",
    ) -> None:
        super().__init__(attribute)
        for key, value in [("ratio", ratio), ("depth", depth)]:
            if not 0 <= value < 1:
                raise RecipeError(
                    f"prune.{key}: expected a value in [0, 1), got {value}. Use 0.5 to remove half of them."
                )
        tables: dict[str, tuple[str, Collection[str]]] = {
            "allocation": (allocation, ALLOCATIONS),
            "criterion": (criterion, CRITERIA),
            "heads": (heads, ("whole", "width")),
        }
        for key, (name, table) in tables.items():
            if name not in table:
                raise RecipeError(f"prune.{key}: expected one of {', '.join(table)}, got {name!r}. Choose one.")
        for key, number in [("round_to", round_to), ("min_width", min_width)]:
            if number < 1:
                raise RecipeError(f"prune.{key}: expected at least 1, got {number}. Use 1 or more.")
        first = timetable(schedule, start=start, end=end, num_edits=num_edits, steps=1, epochs=1)[0][0]
        self.removal = removal or Removal()
        planned = first - (self.removal.lead if self.removal.penalty else 0)
        if CRITERIA[criterion].needs == "gradients" and planned <= 0:
            raise RecipeError(
                f"prune.start: expected some steps before the first choice for criterion {criterion!r}, which looks at "
                f"their gradients, got a choice at {max(0.0, planned)}. Start later, or choose another criterion."
            )
        self.first_edit = first
        self.wishes = Wishes(ratio, target, allocation, criterion, depth, round_to, min_width)
        self.heads = heads
        self.schedule = schedule
        self.start = start
        self.end = end
        self.num_edits = num_edits
        self.ignore = tuple(ignore)
        self._done = 0
        self._witness = Witness(
            criterion, inputs=depth > 0 or allocation == "sensitivity", least=self.removal.recalibrate
        )
        self._pending: Edit | None = None
        self._num_planned = 0
        self._doomed: Doomed = []
        self._timetable: Timetable | None = None

    @property
    def last_edit(self) -> float:
        """Progress of the fit at which the last units go."""
        return last_point(self.schedule, self.end)

    def apply(self, network: nn.Module, edit: Edit) -> nn.Module:
        """Remove what the edit does not keep."""
        return replay_prune(network, edit)

    def rehearse(self, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        """Plan everything at once, by weights alone, so that what would fail late fails now; a latency is not measured.

        Args:
            network: Left untouched.
            inputs: Example inputs, at least two samples each.

        Raises:
            CaptureError: when the network cannot be exported.
            EditError: when a layer to ignore does not exist, there is nothing to remove, a target is out of reach, or
                what is left does not run.
        """
        anatomy = study(network, inputs, ignore=self.ignore, heads=self.heads)
        if self.wishes.depth and not round(self.wishes.depth * len(blocks := find_blocks(anatomy))):
            raise EditError(
                f"prune.depth: expected residual blocks or layers that can be left out, got none at "
                f"{self.wishes.depth} of {len(blocks)} in {type(network).__name__}. Raise prune.depth, or leave it out."
            )
        plain = replace(self.wishes, criterion="l2", allocation="uniform")
        if plain.target is not None and (self.wishes.depth or "latency" in plain.target.currency):
            plain = replace(plain, target=None)
        if plain.ratio and choose_units(Observations(anatomy), plain, 1.0, History()) is None:
            raise self._nothing(network)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs to remove the same units at the same steps."""
        pending = dict(self._pending.data) if self._pending else None
        return {
            "done": self._done,
            "planned": self._num_planned,
            "pending": pending,
            "witness": self._witness.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self._done, self._num_planned = state_dict["done"], state_dict["planned"]
        self._pending = Edit(self.kind, state_dict["pending"]) if state_dict["pending"] else None
        self._witness.load_state_dict(state_dict["witness"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up again what a checkpoint left pending."""
        self._timetable = None
        self._witness.to(pl_module.device)
        self._mark(pl_module, self._pending)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remove units when an edit is due and no gradients are under accumulation."""
        table = self._table(trainer)
        if self._done == len(table) or batch_idx % trainer.accumulate_grad_batches:
            return
        self._witness.note_batch(batch)
        # The tolerance keeps an edit at, say, 0.3 from slipping a step by rounding.
        now = progress(trainer) + 1e-9
        due = sum(now >= when for when, _ in table)
        if due > self._done:
            self._remove(trainer, pl_module, batch, due)
        elif self.removal.penalty and self._num_planned == due and now >= table[due][0] - self.removal.lead:
            self._mark(pl_module, self._plan(trainer, pl_module, batch, table[due][1]))
            self._num_planned = due + 1

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take note of gradients, and push doomed units towards zero."""
        table = self._table(trainer)
        if self._done == len(table):
            return
        self._witness.note_gradients(self.network(pl_module))
        if self.removal.penalty and self._doomed:
            left = (table[self._done][0] - progress(trainer)) / self.removal.lead
            push(self._doomed, self.removal.penalty, self.removal.strength * min(1.0, max(0.0, 1 - left)))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold masked units at zero."""
        if self.removal.form == "soft":
            silence(self._doomed)

    def _table(self, trainer: pl.Trainer) -> Timetable:
        if self._timetable is None:
            steps, epochs = length(trainer)
            self._timetable = timetable(
                self.schedule, start=self.start, end=self.end, num_edits=self.num_edits, steps=steps, epochs=epochs
            )
            if self.wishes.nothing:
                self._timetable = []
        return self._timetable

    def _remove(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, due: int) -> None:
        """Carry out the edits that are due as one."""
        table = self._table(trainer)
        last = due == len(table)
        if self._num_planned == due and self.removal.penalty:
            planned = self._pending
        else:  # not yet, or for an edit that this one overtakes
            planned = self._plan(trainer, pl_module, batch, table[due - 1][1])
        self._num_planned = due
        if self.removal.form == "soft" and not last:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "on_before_masking"):
                    callback.on_before_masking(trainer, pl_module)
            self._mark(pl_module, planned)
            silence(self._doomed)
        else:
            self._mark(pl_module, None)
            if planned is not None:
                self.edit(trainer, pl_module, lambda: planned)
            self._recalibrate(trainer, pl_module)
        self._witness.forget(everything=last)
        self._done = due
        if last and not history_of(pl_module).count(self.kind):
            raise self._nothing(self.network(pl_module))

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, fraction: float) -> Edit | None:
        """Remove the blocks that are due, and plan which units are to go; the same on every rank."""
        inputs, past = example_inputs(pl_module, batch), history_of(pl_module)
        past.check(self.kind)
        with blaming_samples(whole_inputs(pl_module, batch)):
            if self.wishes.depth:
                seen = self._witness.observe(self._study(pl_module, inputs), _mean(trainer))
                self.edit(trainer, pl_module, lambda: self._made(choose_blocks(seen, self.wishes, fraction, past)))
            seen = self._witness.observe(self._study(pl_module, inputs), _mean(trainer))
        planned = choose_units(seen, self.wishes, fraction, past) if trainer.is_global_zero else None
        planned, curves = trainer.strategy.broadcast((planned, seen.curves), src=0)
        self._witness.keep_curves(curves)
        return self._made(planned)

    def _made(self, data: dict[str, Any] | None) -> Edit | None:
        if data is None:
            return None
        log.info("prune: %s", describe(data))
        return Edit(self.kind, data)

    def _recalibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = self.network(pl_module)
        if self.removal.recalibrate:
            recalibrate(network, self._witness.recent[-self.removal.recalibrate :])
            # Each rank has seen batches of its own.
            for name, buffer in network.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.copy_(_mean(trainer)(buffer))

    def _nothing(self, network: nn.Module) -> EditError:
        if self.wishes.target is not None:
            return EditError(
                f"prune.target.{self.wishes.target.currency}: expected less than {type(network).__name__} costs now, "
                f"got {self.wishes.target.value}: there is nothing to remove. Ask for less, or leave prune out."
            )
        return EditError(
            f"prune: expected something to remove at ratio {self.wishes.ratio}, got nothing: no group of channels in "
            f"{type(network).__name__} is wider than {self.wishes.round_to} and unprotected. "
            "Lower prune.round_to, shorten prune.ignore, or leave prune out."
        )

    def _study(self, pl_module: pl.LightningModule, inputs: Sequence[Tensor]) -> Anatomy:
        return study(self.network(pl_module), inputs, ignore=self.ignore, heads=self.heads)

    def _mark(self, pl_module: pl.LightningModule, planned: Edit | None) -> None:
        """Keep what is planned, and where its units lie."""
        self._pending = planned
        self._doomed = doomed_slices(self.network(pl_module), planned.data["slices"]) if planned else []


def _mean(trainer: pl.Trainer) -> Callable[[Tensor], Tensor]:
    """Return what averages a tensor over ranks."""
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean")
