"""Sparse weights as a Lightning callback: more and more of them become zero during a fit, and stay so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from compress.errors import EditError, RecipeError
from compress.prune.masks import global_masks, magnitude_mask, nm_mask, parse_pattern, sparse_weights
from compress.prune.schedules import Timetable, last_point, timetable
from compress.surgery import Edit
from compress.surgery.editor import NetworkCallback, progress
from compress.surgery.relink import check_strategy
from compress.surgery.slicing import slice_tensor
from compress.surgery.timeline import length

__all__ = ["WeightSparsity"]

log = logging.getLogger(__name__)

_SCOPES = ("layer", "global")


class WeightSparsity(NetworkCallback):
    """Make weights zero by magnitude during a fit, on any LightningModule; shapes stay.

    Masks are drawn anew at the scheduled points and held after each optimiser step, so masked weights are exactly zero
    whatever momentum says. They are cut along when channels or blocks are pruned, and survive fake quantization with
    symmetric weights. Engines of this package run such weights as dense ones: it helps files that are compressed and
    hardware with sparse matrix units (2:4), not their latency.

    Args:
        ratio: Fraction of the weights that is zero in the end, in [0, 1), 0.5 by default; a pattern N:M says it itself.
        pattern: ``unstructured``, or ``N:M``: of every M weights along the inputs, N stay. On its way there, as far as
            the schedule has come, more of them stay. Layers whose inputs do not divide by M stay dense.
        scope: Whether a ratio holds in each ``layer`` or ``global`` for all weights together.
        schedule: How zeros spread over the points: ``cubic``, ``linear``, ``cosine``, ``one_shot``, or points
            ``[progress, fraction]``.
        start: Progress of the fit at the first point, in [0, 1).
        end: Progress at the last point.
        num_edits: How many points, or how often: ``"200 steps"``, ``"2 epochs"``.
        ignore: Names of layers that stay dense. Without it these are the first and the last layer. Biases,
            normalisations and embeddings are dense in any case.
        attribute: Name of the LightningModule's attribute that holds the network.

    Raises:
        RecipeError: when a value is out of range.
    """

    kind = "sparsify"

    def __init__(
        self,
        ratio: float | None = None,
        *,
        pattern: str = "unstructured",
        scope: str = "layer",
        schedule: str | list[list[float]] = "cubic",
        start: float = 0.1,
        end: float = 0.5,
        num_edits: int | str = 5,
        ignore: Sequence[str] | None = None,
        attribute: str = "student",
    ) -> None:
        super().__init__(attribute)
        self.pattern = pattern
        self._grid = parse_pattern(pattern)
        if ratio is not None and self._grid is not None:
            raise RecipeError(f"sparsify.ratio: expected none beside pattern {pattern}, got {ratio}. Leave it out.")
        if ratio is not None and not 0 <= ratio < 1:
            raise RecipeError(f"sparsify.ratio: expected a value in [0, 1), got {ratio}. Use 0.5 for half of them.")
        if scope not in _SCOPES:
            raise RecipeError(f"sparsify.scope: expected one of {', '.join(_SCOPES)}, got {scope!r}. Choose one.")
        timetable(schedule, start=start, end=end, num_edits=num_edits, where=self.kind)
        self.ratio = 0.5 if ratio is None else ratio
        self.scope = scope
        self.schedule = schedule
        self.start = start
        self.end = end
        self.num_edits = num_edits
        self.ignore = ignore
        self._done = 0
        self._share = 0.0
        self._masks: dict[str, Tensor] = {}
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
        self._edited = False
        self._timetable: Timetable | None = None

    @property
    def last_edit(self) -> float:
        """Progress of the fit at which masks are drawn for the last time."""
        return last_point(self.schedule, self.end)

    def rehearse(self, network: nn.Module) -> None:
        """Look for layers to make sparse, so that what would fail in mid-fit fails now.

        Raises:
            EditError: when there is none, or a layer to ignore does not exist.
        """
        self._names(network)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything runs."""
        self.network(pl_module)
        if stage == "fit":
            check_strategy(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, and how far the schedule has come."""
        return {"done": self._done, "share": self._share, "masks": {name: m.cpu() for name, m in self._masks.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self._done, self._share, self._masks = state_dict["done"], state_dict["share"], dict(state_dict["masks"])
        self._pairs = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the schedule for this fit."""
        self._pairs = None
        steps, epochs = length(trainer)
        self._timetable = timetable(
            self.schedule,
            start=self.start,
            end=self.end,
            num_edits=self.num_edits,
            steps=steps,
            epochs=epochs,
            where=self.kind,
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw masks when it is due and no gradients are under accumulation."""
        table = self._timetable or []
        if self._done == len(table) or batch_idx % trainer.accumulate_grad_batches:
            return
        now = progress(trainer) + 1e-9  # a point at, say, 0.3 must not slip a step by rounding
        due = sum(now >= when for when, _ in table)
        if due > self._done:
            self._done, self._share = due, table[due - 1][1]
            self._draw(self.network(pl_module))

    def on_before_edit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, edit: Edit) -> None:
        """Cut masks along with their weights, and let go of those whose block goes."""
        slices, blocks = edit.data.get("slices", {}), tuple(f"{name}." for name in edit.data.get("blocks", ()))
        self._masks = {
            name: slice_tensor(mask, slices.get(name, {}))
            for name, mask in self._masks.items()
            if not name.startswith(blocks)
        }
        self._pairs = None
        self._edited = bool(slices)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold masked weights at zero, after every step of the optimiser."""
        if self._edited and self._grid is not None and self._masks:
            self._draw(self.network(pl_module))  # what is left of the inputs makes other groups of M
        self._edited = False
        self._hold(self.network(pl_module))

    def _draw(self, network: nn.Module) -> None:
        weights = {name: weight.detach() for name, weight in network.named_parameters()}
        chosen = {name: weights[name] for name in self._names(network)}
        if self._grid is not None:
            n, m = self._grid
            kept = m - round((m - n) * self._share)
            fresh = {name: nm_mask(weight, kept, m) for name, weight in chosen.items()}
        elif self.scope == "global":
            fresh = global_masks(chosen, self.ratio * self._share)
        else:
            fresh = {name: magnitude_mask(weight, self.ratio * self._share) for name, weight in chosen.items()}
        self._masks |= fresh
        self._pairs = None
        self._hold(network)
        zeros = sum(int((~mask).sum()) for mask in fresh.values())
        total = sum(mask.numel() for mask in fresh.values())
        log.info("sparsify: %.1f %% of the weights of %d layers are zero", 100 * zeros / total, len(fresh))

    def _names(self, network: nn.Module) -> list[str]:
        """Return the weights that are or become sparse."""
        shapes = {name: weight.shape for name, weight in network.named_parameters()}
        names = list(self._masks) or sparse_weights(network, self.ignore)
        if self._grid is not None:
            names = [name for name in names if shapes[name][1] % self._grid[1] == 0]
        if not names:
            raise EditError(
                f"sparsify: expected layers of {type(network).__name__} to make sparse, got none for pattern "
                f"{self.pattern}. Only matrices and kernels count, and without sparsify.ignore neither the first nor "
                "the last: set sparsify.ignore, or leave sparsify out."
            )
        return names

    @torch.no_grad()
    def _hold(self, network: nn.Module) -> None:
        if not self._masks:
            return
        if self._pairs is None:
            weights = dict(network.named_parameters())
            self._masks = {n: mask.to(weights[n].device) for n, mask in self._masks.items() if n in weights}
            self._pairs = [weights[name] for name in self._masks], list(self._masks.values())
        if self._pairs[0]:
            torch._foreach_mul_(*self._pairs)
