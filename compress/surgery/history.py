"""What was done to a network, in order, as plain data: enough to rebuild its structure from the original class."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from compress.errors import EditError
from compress.files import write_text

__all__ = ["Edit", "Handler", "History", "replay"]

_FORMAT, _VERSION = "compress-history", 1


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
            EditError: when the network is already quantised.
        """
        self.check(edit.kind)
        self._edits.append(edit)

    def check(self, kind: str) -> None:
        """Refuse an edit before it is planned.

        Raises:
            EditError: when the network is already quantised: its structure is then a fixed graph.
        """
        if self.count("quantize"):
            raise EditError(f"history: expected no edit after 'quantize', got {kind!r}. Prune first, then quantise.")

    def count(self, kind: str) -> int:
        """Count the edits of a kind."""
        return sum(edit.kind == kind for edit in self._edits)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the edits as plain lists and dicts."""
        return [{"kind": edit.kind, "data": dict(edit.data)} for edit in self._edits]

    @classmethod
    def from_list(cls, edits: Iterable[Mapping[str, Any]]) -> History:
        """Rebuild what ``to_list`` wrote.

        Raises:
            EditError: when it is something else.
        """
        try:
            return cls([Edit(str(edit["kind"]), dict(edit["data"])) for edit in edits])
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(
                f'history: expected a list of {{"kind": ..., "data": ...}}, got {type(error).__name__}: {error}. '
                "Use what History.to_list gave."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the history as JSON; the file appears whole or not at all.

        Args:
            path: File to write, e.g. ``history.json``.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"format": _FORMAT, "version": _VERSION, "edits": self.to_list()}))

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what ``save`` wrote.

        Raises:
            EditError: when the file is missing, damaged, something else, or written by a later version.
        """
        path = Path(path)
        where = f"{path}: expected a history of edits"
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
            raise EditError(f"{where}, got {got}. Use a file that History.save wrote.") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise EditError(f"{where}, got other JSON. Use a file that History.save wrote.")
        version = content.get("version")
        if not isinstance(version, int) or not 1 <= version <= _VERSION:
            raise EditError(f"{where} of version {_VERSION}, got version {version!r}. Update compress to read it.")
        edits: Any = content.get("edits")
        try:
            return cls.from_list(edits)
        except EditError as error:
            raise EditError(f"{where}, got a damaged one ({error}).") from error

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
