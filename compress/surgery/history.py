"""What was done to a network, in order, as plain data: enough to rebuild its structure from the original class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress.errors import EditError

__all__ = ["Edit", "Handler", "History", "replay"]


@dataclass(frozen=True)
class Edit:
    """One structural change.

    Args:
        kind: Names the technique, e.g. ``"prune"``; it selects the handler at replay.
        data: JSON-safe description, complete enough to repeat the change without looking at any weight.
    """

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


Handler = Callable[[nn.Module, Edit], nn.Module]
"""Applies an edit of one kind to a network, in place or not, and returns the network to use from then on."""


class History:
    """An ordered list of edits that survives ``torch.load(weights_only=True)`` and JSON.

    Example:
        >>> history = History([Edit("prune", {"slices": {}})])
        >>> History.from_list(history.to_list()) == history
        True
        >>> history.count("prune"), history.count("quantize")
        (1, 0)
    """

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._edits: list[Edit] = []
        for edit in edits:
            self.append(edit)

    def append(self, edit: Edit) -> None:
        """Add an edit.

        Raises:
            EditError: when the network is already quantised: its structure is then a fixed graph.
        """
        if self.count("quantize"):
            raise EditError(
                f"history: expected no edit after 'quantize', got {edit.kind!r}. Prune first, then quantise."
            )
        self._edits.append(edit)

    def count(self, kind: str) -> int:
        """Count the edits of a kind."""
        return sum(edit.kind == kind for edit in self._edits)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the edits as plain lists and dicts."""
        return [{"kind": edit.kind, "data": dict(edit.data)} for edit in self._edits]

    @classmethod
    def from_list(cls, edits: Iterable[Mapping[str, Any]]) -> History:
        """Rebuild what ``to_list`` wrote."""
        return cls(Edit(edit["kind"], edit["data"]) for edit in edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    def __len__(self) -> int:
        return len(self._edits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self._edits == other._edits

    __hash__ = None  # type: ignore[assignment]


def replay(network: nn.Module, edits: Iterable[Edit], handlers: Mapping[str, Handler]) -> nn.Module:
    """Apply edits in order to a freshly built network.

    Args:
        network: The network in its original structure.
        edits: What to repeat.
        handlers: One function for each kind of edit.

    Returns:
        The network with the structure that the edits describe; weights are whatever slicing left.

    Raises:
        EditError: when a kind has no handler.
    """
    for edit in edits:
        if edit.kind not in handlers:
            raise EditError(
                f"history: expected edits of kind {sorted(handlers)}, got {edit.kind!r}. "
                "Add the callback that made this edit to the Trainer."
            )
        network = handlers[edit.kind](network, edit)
    return network
