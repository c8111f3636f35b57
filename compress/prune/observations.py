"""What a fit lets criteria and allocations see: gradients since the last edit, recent inputs, measured curves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compress.prune.anatomy import Anatomy
from compress.prune.criteria import CRITERIA, Activation, Gradients, measure_activations
from compress.surgery.editor import inputs_of

__all__ = ["Observations", "Witness"]

_NUM_RECENT = 8


@dataclass
class Observations:
    """What is known when an edit is planned.

    Args:
        anatomy: The network.
        gradients: Sums since the last edit.
        activations: Of each group, on recent batches.
        batches: Recent inputs.
        curves: Sensitivity of each group; measured once, where the allocation needs them.
    """

    anatomy: Anatomy
    gradients: Gradients | None = None
    activations: Mapping[str, Activation] | None = None
    batches: Sequence[tuple[Tensor, ...]] = ()
    curves: dict[str, Any] = field(default_factory=dict)


class Witness:
    """Keeps what the settings of a fit need, and nothing else.

    Args:
        criterion: A key of ``CRITERIA``.
        inputs: Whether something besides the criterion looks at recent inputs.
        least: Batches to keep at least.
    """

    def __init__(self, criterion: str, *, inputs: bool, least: int) -> None:
        self._needs = CRITERIA[criterion].needs
        self._gradients = Gradients() if self._needs == "gradients" else None
        num = max(least, _NUM_RECENT if inputs or self._needs == "activations" else 0)
        self._recent: deque[tuple[Tensor, ...]] = deque(maxlen=num)
        self._curves: dict[str, Any] = {}

    @property
    def recent(self) -> list[tuple[Tensor, ...]]:
        """The last inputs, oldest first."""
        return list(self._recent)

    def note_batch(self, batch: Any) -> None:
        """Keep a batch's inputs.

        Raises:
            EditError: when its first element is no tensor or tuple of tensors.
        """
        if not self._recent.maxlen:
            return
        hint = "Use a criterion that needs weights or gradients alone, allocation: uniform or global, no depth and no "
        tensors = inputs_of(batch, otherwise=f"{hint}recalibration.")
        self._recent.append(tuple(tensor.detach() for tensor in tensors))

    def note_gradients(self, network: nn.Module) -> None:
        """Add the gradients of a step."""
        if self._gradients is not None:
            self._gradients.update(network)

    def observe(self, anatomy: Anatomy, reduce: Callable[[Tensor], Tensor]) -> Observations:
        """Return what has been seen, averaged over ranks.

        Args:
            anatomy: The network; every rank has it.
            reduce: Returns a tensor's mean over ranks.
        """
        activations = None
        if self._needs == "activations":
            measured = measure_activations(anatomy, self.recent)
            activations = {name: activation.all_reduce(reduce) for name, activation in measured.items()}
        if self._gradients is not None:
            self._gradients.all_reduce(reduce)
        return Observations(anatomy, self._gradients, activations, self.recent, self._curves)

    def keep_curves(self, curves: dict[str, Any]) -> None:
        """Keep measured curves for later edits."""
        self._curves = curves

    def forget(self, *, everything: bool) -> None:
        """Begin anew after an edit; after the last one, let go of everything."""
        if self._gradients is not None:
            self._gradients.reset()
        if everything:
            self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return it all as plain containers of tensors."""
        return {
            "gradients": self._gradients.state_dict() if self._gradients is not None else None,
            "recent": [list(inputs) for inputs in self._recent],
            "curves": self._curves,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        if self._gradients is not None and state_dict["gradients"] is not None:
            self._gradients.load_state_dict(state_dict["gradients"])
        self._recent.extend(tuple(inputs) for inputs in state_dict["recent"])
        self._curves = state_dict["curves"]

    def to(self, device: Any) -> None:
        """Move recent inputs to a device; a checkpoint brings them on the CPU."""
        self._recent = deque((tuple(t.to(device) for t in inputs) for inputs in self._recent), self._recent.maxlen)
