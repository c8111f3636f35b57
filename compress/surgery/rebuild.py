"""A pruned network from its constructor and a JSON history, without a Trainer.

This room stands below the techniques, so it knows an edit's handler by a dotted name only and looks it up when a
history asks for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from compress.surgery.history import Handler, History, replay

__all__ = ["HANDLERS", "rebuild"]

HANDLERS = {"prune": "compress.prune.replay_prune", "quantize": "compress.quantize.replay_quantize"}
"""Where the handler of each kind of edit is."""


def rebuild(
    model: nn.Module,
    history: History | Iterable[Mapping[str, Any]] | str | Path,
    *,
    handlers: Mapping[str, Handler] | None = None,
) -> nn.Module:
    """Return the network that a history leads to; its ``state_dict`` can then be loaded.

    Args:
        model: As its constructor gives it; left alone.
        history: A ``History``, what its ``to_list`` gave, or a file that its ``save`` wrote.
        handlers: For kinds of edits beside those in ``HANDLERS``.

    Returns:
        A network in the structure after the last edit, with whatever weights slicing left.

    Raises:
        EditError: when the file is damaged, a kind of edit is unknown, or the history belongs to another architecture;
            the message names the first tensor that differs.

    Example:
        >>> edit = {"kind": "prune", "data": {"slices": {"weight": {"0": [1]}, "bias": {"0": [1]}}, "attributes": {}}}
        >>> rebuild(nn.Linear(3, 2), [edit]).weight.shape
        torch.Size([1, 3])
    """
    if isinstance(history, str | Path):
        history = History.load(history)
    if not isinstance(history, History):
        history = History.from_list(history)
    known = dict(handlers or {})
    for kind in {edit.kind for edit in history}:
        if kind not in known and kind in HANDLERS:
            module, _, name = HANDLERS[kind].rpartition(".")
            known[kind] = getattr(import_module(module), name)
    return replay(copy.deepcopy(model), history, known)
