"""The door through which every structural change enters a fit, on any LightningModule."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from compress.errors import EditError
from compress.surgery.averages import find_averages
from compress.surgery.compiled import drop_compiled, inside, original, successor
from compress.surgery.history import Edit, Handler, History, replay
from compress.surgery.ranks import check_ranks
from compress.surgery.relink import check_strategy, relink_trainer
from compress.surgery.slicing import Slices, apply_slices
from compress.surgery.timeline import progress

__all__ = [
    "ModelEditor",
    "NetworkCallback",
    "example_inputs",
    "find_network",
    "history_of",
    "inputs_of",
    "progress",
    "whole_inputs",
]

log = logging.getLogger(__name__)

_HISTORY = "_compress_history"
_KEY = "compress_history"
_ATTRIBUTE = "_compress_attribute"


def history_of(pl_module: pl.LightningModule) -> History:
    """Return the history of a module's network, which the editing callbacks of one fit share."""
    if _HISTORY not in pl_module.__dict__:
        pl_module.__dict__[_HISTORY] = History()
    return pl_module.__dict__[_HISTORY]


def example_inputs(pl_module: pl.LightningModule, batch: Any) -> tuple[Tensor, ...]:
    """Return inputs of the network, two samples each, on the module's device.

    They come from ``example_input_array`` where the module has one, else from the first element of the batch.

    Raises:
        EditError: when neither gives a tensor.
    """
    tensors = whole_inputs(pl_module, batch)
    # A batch of one is doubled: torch.export takes a size of 1 for a constant.
    pairs = [tensor[:2] if len(tensor) > 1 else tensor.expand(2, *tensor.shape[1:]) for tensor in tensors]
    return tuple(tensor.detach().to(pl_module.device) for tensor in pairs)


def whole_inputs(pl_module: pl.LightningModule, batch: Any) -> tuple[Tensor, ...]:
    """Return the inputs of which ``example_inputs`` takes two samples each.

    Raises:
        EditError: when neither ``example_input_array`` nor the first element of the batch gives a tensor.
    """
    example = pl_module.example_input_array
    hint = "Set example_input_array on the LightningModule."
    return inputs_of(batch if example is None else [example], otherwise=hint)


def inputs_of(batch: Any, *, otherwise: str) -> tuple[Tensor, ...]:
    """Return a batch's inputs: its first element, a tensor or several.

    Args:
        batch: From a loader.
        otherwise: What to do where there are none, for the error.

    Raises:
        EditError: when the first element holds something else.

    Example:
        >>> import torch
        >>> [tensor.shape for tensor in inputs_of((torch.ones(2, 3), torch.ones(2)), otherwise="")]
        [torch.Size([2, 3])]
    """
    first = batch[0] if isinstance(batch, list | tuple) else batch
    tensors = tuple(first) if isinstance(first, list | tuple) else (first,)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise EditError(f"batch: expected (inputs, ...) with tensors, got {type(first).__name__}. {otherwise}")
    return tensors


def find_network(pl_module: pl.LightningModule, attribute: str, *, who: str) -> nn.Module:
    """Return the network that an attribute of a module holds, without ``torch.compile``'s wrapper.

    Args:
        pl_module: Holds the network.
        attribute: Its name.
        who: The callback that asks, for the error.

    Raises:
        EditError: when the module has no such attribute.
    """
    network = getattr(pl_module, attribute, None)
    if not isinstance(network, nn.Module):
        raise EditError(
            f"{who}.attribute: expected the name of a network of {type(pl_module).__name__}, "
            f"got {attribute!r}. Its networks are: {', '.join(dict(pl_module.named_children()))}."
        )
    return original(network)


class NetworkCallback(Callback):
    """Base of the callbacks that work on a network of a LightningModule.

    Args:
        attribute: Name of the LightningModule's attribute that holds the network.
    """

    def __init__(self, attribute: str = "student") -> None:
        self.attribute = attribute

    def network(self, pl_module: pl.LightningModule) -> nn.Module:
        """Return that network, without ``torch.compile``'s wrapper.

        Raises:
            EditError: when the module has no such attribute.
        """
        return find_network(pl_module, self.attribute, who=type(self).__name__)


class ModelEditor(NetworkCallback):
    """Base of the callbacks that change a network's structure.

    A subclass says what an edit of its ``kind`` does (``apply``), and calls ``edit`` when one is due. Checkpoints
    then hold the history, and a fit that resumes replays it before the weights are loaded.

    Args:
        attribute: Name of the LightningModule's attribute that holds the network.
    """

    kind: str

    @abstractmethod
    def apply(self, network: nn.Module, edit: Edit) -> nn.Module:
        """Carry out an edit of this callback's kind and return the network to use from then on."""

    def edit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: Callable[[], Edit | None]) -> Edit | None:
        """Plan an edit on rank 0, apply it on every rank and re-link the Trainer.

        Callbacks of the Trainer that have a method ``on_before_edit(trainer, pl_module, edit)`` are called first. A
        module that has learned something on the network's channels has a method ``before_edit(edit, apply)``, which
        cuts it along and returns the slices by the names of the module's parameters; it is called at replay, too.
        Averages of the weights follow, what ``torch.compile`` made of the network is made anew, and gradients under
        accumulation are cut along.

        Args:
            trainer: In the middle of a fit, between two training steps.
            pl_module: Holds the network.
            plan: Called on rank 0 alone; ``None`` means that there is nothing to do.

        Returns:
            The edit as applied, or ``None``.

        Raises:
            EditError: when it does not fit, or the ranks' parameters differ after it.
        """
        edit = trainer.strategy.broadcast(plan() if trainer.is_global_zero else None, src=0)
        if edit is None:
            return None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_before_edit"):
                callback.on_before_edit(trainer, pl_module, edit)
        before = dict(pl_module.named_parameters())
        slices = _carry_out(trainer, pl_module, self.attribute, edit, self.apply)
        relink_trainer(trainer, pl_module, before, slices)
        check_ranks(trainer, pl_module)
        return edit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Arrange that a checkpoint's history is replayed before its weights are loaded.

        Raises:
            EditError: when the module has no such attribute, or another of its networks is edited, too.
        """
        self.network(pl_module)
        editors = [callback for callback in trainer.callbacks if isinstance(callback, ModelEditor)]  # type: ignore[attr-defined]
        self._check_attribute(pl_module, editors)
        if stage == "fit":
            check_strategy(trainer)
        if "on_load_checkpoint" in pl_module.__dict__:
            return  # another editing callback of this Trainer has done it
        handlers: dict[str, Handler] = {editor.kind: editor.apply for editor in editors}
        original = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._replay(trainer, pl_module, checkpoint, handlers)
            original(checkpoint)

        # Of all hooks, only the module's own runs between reading a checkpoint and loading its weights.
        pl_module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hook of ``setup`` away again."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the history into the checkpoint."""
        checkpoint[_KEY] = history_of(pl_module).to_list()

    def _check_attribute(self, pl_module: pl.LightningModule, editors: Sequence[ModelEditor]) -> None:
        """Refuse a second network: a module has one history, which does not say whose edits it holds."""
        edited = pl_module.__dict__.get(_ATTRIBUTE)
        others = [editor.attribute for editor in editors] + ([] if edited is None else [edited])
        if other := next((name for name in others if name != self.attribute), None):
            raise EditError(
                f"{type(self).__name__}.attribute: expected one network for all edits of a LightningModule, got "
                f"{self.attribute!r} beside {other!r}. Train each in a LightningModule of its own."
            )

    def _replay(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
        handlers: dict[str, Handler],
    ) -> None:
        done, wanted = list(history_of(pl_module)), list(History.from_list(checkpoint.get(_KEY, [])))
        if wanted[: len(done)] != done:
            raise EditError(
                "checkpoint: expected the history of this network, got another one. "
                "Build the network anew before loading this checkpoint."
            )
        for edit in wanted[len(done) :]:
            apply: Handler = lambda network, edit: replay(network, [edit], handlers)  # noqa: E731
            _carry_out(trainer, pl_module, self.attribute, edit, apply)


def _carry_out(
    trainer: pl.Trainer, pl_module: pl.LightningModule, attribute: str, edit: Edit, apply: Handler
) -> Slices:
    """Apply an edit to a module's network, to what the module has learned on it and to averages; return all slices."""
    History([*history_of(pl_module), edit])  # refuses an edit out of order before anything changes
    averages = find_averages(trainer, pl_module, attribute)
    before: Any = getattr(pl_module, "before_edit", None)
    learned: dict[str, Mapping[str, Sequence[int]]] = dict(before(edit, apply)) if before is not None else {}
    holder = getattr(pl_module, attribute)
    edited = apply(original(holder), edit)
    setattr(pl_module, attribute, successor(pl_module, holder, edited))
    drop_compiled(pl_module)
    history_of(pl_module).append(edit)
    pl_module.__dict__[_ATTRIBUTE] = attribute
    kept = edit.data.get("slices", {})
    slices = learned | {f"{attribute}.{inside(holder)}{name}": what for name, what in kept.items()}
    for average in averages:
        average.follow(edited, kept)
        if isinstance(average.owner, pl.LightningModule):
            apply_slices(average.owner, learned, {})
        if average.prefix is not None:
            slices |= {f"{average.prefix}{name}": what for name, what in kept.items()}
    return slices
