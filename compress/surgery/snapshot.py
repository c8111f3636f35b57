"""A network on disk: its history and its weights, loaded with ``weights_only=True``; never a pickled module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from compress.errors import EditError
from compress.files import replacing
from compress.surgery.compiled import original
from compress.surgery.history import Handler, History, replay

__all__ = ["load_snapshot", "save_snapshot"]


def save_snapshot(path: str | Path, network: nn.Module, history: History) -> None:
    """Write a network's history and weights, and its history again as JSON beside it; files appear whole or not at all.

    Args:
        path: File to write; the history of an edited network goes to ``<name>.history.json``, for ``rebuild``.
        network: Its ``state_dict`` is saved.
        history: The edits that led from the original class to this structure.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in original(network).state_dict().items()}
    beside = path.with_suffix(".history.json")
    with replacing(path) as temporary:
        with temporary.open("wb") as file:  # opened here: torch writes a name into the file
            torch.save({"history": history.to_list(), "state_dict": state}, file)
        if len(history):
            history.save(beside)
        else:
            beside.unlink(missing_ok=True)  # of an edited network that lay here before


def load_snapshot(path: str | Path, network: nn.Module, handlers: Mapping[str, Handler]) -> tuple[nn.Module, History]:
    """Rebuild a saved network: original class, then history, then weights.

    Args:
        path: File that ``save_snapshot`` wrote.
        network: The network in its original structure.
        handlers: One function for each kind of edit.

    Returns:
        The network and its history.

    Raises:
        EditError: when the file is missing, is no snapshot, or belongs to another network.
    """
    path = Path(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        history = History.from_list(saved["history"])
        state = saved["state_dict"]
    except Exception as error:  # unpickling a foreign or damaged file raises almost anything
        raise EditError(f"{path}: expected a snapshot of a network, got {type(error).__name__}: {error}.") from error
    network = replay(network, history, handlers)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise EditError(
            f"{path}: expected weights of {type(network).__name__}, got others "
            f"({str(error).splitlines()[-1].strip()}). Use the checkpoint of this recipe."
        ) from error
    return network, history
