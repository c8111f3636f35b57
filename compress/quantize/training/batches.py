"""What a fit's batches hold for the network: tried at the first, read again for calibration after the last."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from compress.errors import DataError, EditError
from compress.surgery.editor import inputs_of

__all__ = ["InputReader", "training_batches"]


class InputReader:
    """Finds the network's inputs in batches, where a fit needs them.

    Args:
        function: Returns them, a tensor or several; ``None`` where they are a batch's first element.
        start: Progress from which on the network is quantised; with 1 batches calibrate.
        learn_steps: Whether the batch at hand then gives steps their sizes.
        sizes_vary: Whether inputs may have other sizes than those of ``example_input_array``, beyond the batch.
    """

    def __init__(
        self, function: Callable[[Any], Any] | None, *, start: float, learn_steps: bool, sizes_vary: bool
    ) -> None:
        self._function = function
        self._sizes_vary = sizes_vary
        self._always = start == 1 or learn_steps
        others = "train with start below 1" if start == 1 else "leave learn_steps out"
        if not self._always:
            others = "set example_input_array on the LightningModule"
        self._do = f"Give the callback inputs=, a function that returns the network's inputs in a batch, or {others}."
        self._tried = False

    def read(self, batch: Any) -> tuple[Tensor, ...]:
        """Return the network's inputs in a batch.

        Raises:
            EditError: when they are not where they are looked for.
            DataError: when the function returns something else than tensors.
        """
        if self._function is None:
            return inputs_of(batch, otherwise=self._do)
        given = self._function(batch)
        tensors = tuple(given) if isinstance(given, list | tuple) else (given,)
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            got = ", ".join(type(tensor).__name__ for tensor in tensors) or "none"
            raise DataError(
                f"quantize.inputs: expected a function that returns a tensor or a tuple of tensors, got {got}. Return "
                "the network's inputs, in the order of its arguments."
            )
        return tensors

    def readable(self, pl_module: pl.LightningModule, batch: Any) -> Any:
        """Return a batch whose first element is the inputs; as it is where ``example_input_array`` stands for them."""
        return [self.read(batch)] if self._always or pl_module.example_input_array is None else batch

    def begin(self) -> None:
        """Try the next batch again: it is the first of a fit."""
        self._tried = False

    def try_first(self, pl_module: pl.LightningModule, network: nn.Module, batch: Any) -> tuple[Tensor, ...]:
        """Refuse at the first batch of a fit what would be refused where the network is quantised, or after the end.

        Args:
            pl_module: May have an ``example_input_array``.
            network: Takes what is read.
            batch: As ``training_step`` gets it; ``None`` where that takes the loader's iterator and has not yet.

        Returns:
            What was read from the first batch; nothing of others, or where ``example_input_array`` is enough.

        Raises:
            EditError: when the inputs are not where they are looked for.
            DataError: when they are not what the network takes.
        """
        if self._tried or batch is None:
            return ()
        self._tried = True
        example = pl_module.example_input_array
        if example is not None and not self._always:
            self._warn_of_sizes(batch, example)
            return ()
        tensors = self.read(batch)
        likes = tensors if example is None else inputs_of([example], otherwise="Set it to a tensor or to several.")
        if not _are_alike(tensors, likes, self._sizes_vary):
            expected = f"what example_input_array is like, {_described(likes)}"
        elif not _can_take(network, tensors):
            expected = f"those of {type(network).__name__}.forward{inspect.signature(network.forward)}"
        else:
            return tensors
        raise DataError(f"batch: expected the network's inputs, {expected}, got {_described(tensors)}. {self._do}")

    def _warn_of_sizes(self, batch: Any, example: Any) -> None:
        """Say at once that a graph of the example may not take the batches, which ``training_step`` may reshape yet."""
        try:
            tensors, likes = (inputs_of(given, otherwise="") for given in (batch, [example]))
        except EditError:
            return
        if self._sizes_vary or len(tensors) != len(likes):
            return
        if any(tensor.shape[1:] != like.shape[1:] for tensor, like in zip(tensors, likes)):
            rank_zero_warn(
                f"quantize.lengths: expected batches of the sizes of example_input_array, {_described(likes)}, got "
                f"{_described(tensors)}: the graph takes no others. Make them alike, or name in lengths what varies."
            )


def training_batches(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Any]:
    """Yield training batches after a fit as ``training_step`` got them, from all loaders, within the Trainer's limits.

    They come in the order of the last epoch, which a fit that goes on here has not seen.
    """
    # Private, as some lines below: what is public does not say how several loaders go together.
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        return
    for loader in combined.flattened:
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(max(0, trainer.current_epoch - 1))
    most = trainer.num_training_batches  # the loop keeps to it, not the loader
    for batch, *_ in islice(combined, None if most == math.inf else int(most)):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _can_take(network: nn.Module, tensors: Sequence[Tensor]) -> bool:
    try:
        inspect.signature(network.forward).bind(*tensors)
    except TypeError:
        return False
    return True


def _are_alike(tensors: Sequence[Tensor], likes: Sequence[Tensor], sizes_vary: bool) -> bool:
    return len(tensors) == len(likes) and all(
        tensor.dim() == like.dim()
        and tensor.is_floating_point() == like.is_floating_point()
        and (sizes_vary or tensor.shape[1:] == like.shape[1:])
        for tensor, like in zip(tensors, likes)
    )


def _described(tensors: Sequence[Tensor]) -> str:
    return " and ".join(
        f"({', '.join(['N', *map(str, tensor.shape[1:])])}) {str(tensor.dtype).removeprefix('torch.')}"
        for tensor in tensors
    )
