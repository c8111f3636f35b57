"""Find out before hours of training what would fail after them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import KeyedDataModule
from compress.distill import Distiller, read_batch
from compress.errors import CaptureError, CompressError, DataError, RecipeError
from compress.recipe import Recipe
from compress.surgery import Captured
from compress.surgery.capture import export_program

__all__ = ["load_weights", "preflight"]


def preflight(recipe: Recipe) -> None:
    """Load the data, run the networks on two samples, and try what the recipe will do to them; nothing is written.

    Raises:
        DataError: when the data are missing, do not fit the networks, or cannot have keys that a cache needs.
        RecipeError: when the teacher's checkpoint does not fit, a loss does not fit student and teacher, or an
            improvement of quantization finds nothing to work on.
        EditError: when the student cannot be pruned or made sparse, or a layer to ignore does not exist.
        CaptureError: when the student cannot be quantised, or captured with ``export.lengths``.
    """
    recipe.data.prepare_data()
    recipe.data.setup("fit")
    batch = next(iter(recipe.data.val_dataloader()))
    inputs, targets = _two_samples(batch)
    if recipe.teacher is not None:
        if recipe.teacher.cache:
            KeyedDataModule(recipe.data, seed=recipe.seed).train_dataloader()
        if isinstance(recipe.teacher.model, nn.Module):
            if recipe.teacher.checkpoint is not None:
                load_weights(recipe.teacher.model, recipe.teacher.checkpoint, key="teacher.checkpoint")
            _try(recipe, "teacher.model", recipe.teacher.model, inputs, targets)
        for number, assistant in enumerate(recipe.teacher.assistants):
            _try(recipe, f"teacher.assistants[{number}]", assistant, inputs, targets)
    if recipe.student_checkpoint is not None:
        load_weights(copy.deepcopy(recipe.student), recipe.student_checkpoint, key="student_checkpoint")
    _try(recipe, "student", recipe.student, inputs, targets)
    if recipe.teacher is not None:
        _try_losses(recipe, inputs, targets)
    student = copy.deepcopy(recipe.student)
    if recipe.export.lengths:
        export_program(copy.deepcopy(student).eval(), inputs, lengths=recipe.export.lengths)
    if recipe.prune is not None:
        recipe.prune.rehearse(student, inputs)
    if recipe.sparsify is not None:
        recipe.sparsify.rehearse(student)
    if recipe.quantize is not None and not isinstance(recipe.quantize.rehearse(student, inputs), Captured):
        _try_to_run(recipe.student, inputs)


def _try_to_run(student: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Warn where a student that is quantised without a graph will have none in the end, either."""
    try:
        export_program(copy.deepcopy(student).eval(), inputs, strict=False)
    except CaptureError as error:
        warnings.warn(f"export: no artefact can be made of this student, only trained weights. {error}", stacklevel=3)


def _two_samples(batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the first two samples of a batch: inputs, by position, and targets."""
    given = read_batch(batch) if isinstance(batch, list | tuple) and len(batch) == 2 else None
    if given is None or given.named or not all(isinstance(part, Tensor) for part in (*given.inputs, given.targets)):
        raise DataError(
            "data: expected batches (inputs, targets) of tensors, got others. Return such pairs; several inputs are a "
            "tuple, in the order of the network's arguments."
        )
    return tuple(tensor[:2] for tensor in given.inputs), given.targets[:2]


def _try_losses(recipe: Recipe, inputs: Sequence[Tensor], targets: Tensor) -> None:
    """Compute every loss once, on copies: layers that do not exist and shapes that do not fit show here."""
    assert recipe.teacher is not None
    module = Distiller(
        copy.deepcopy(recipe.student),
        task=recipe.task,
        optimizer=recipe.optimizer,
        teacher=copy.deepcopy(recipe.teacher.model),
        losses=copy.deepcopy(recipe.distill.losses),
        task_weight=recipe.distill.task_weight,
    )
    keys = torch.tensor([[number, 0] for number in range(len(targets))])
    with torch.random.fork_rng(devices=[]):
        try:
            module.prepare(lambda: (inputs, targets, keys))
            module.objective(module.lesson((inputs, targets, keys)))
        except CompressError:
            raise
        except Exception as error:  # whatever a loss says to outputs or activations that do not fit it
            raise RecipeError(
                f"distill.losses: expected losses that fit student and teacher, got {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}. Change the losses or the layers that they name."
            ) from error


def load_weights(model: nn.Module, path: str | Path, *, key: str) -> None:
    """Load a state_dict, or a checkpoint that holds one under ``state_dict``, with ``weights_only=True``.

    Args:
        model: Gets the weights.
        path: The file.
        key: Of the recipe, for the error.

    Raises:
        RecipeError: when the file is missing, of another kind, or of another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state))
    except Exception as error:  # a missing file, a foreign format or other weights
        raise RecipeError(
            f"{key}: expected weights of {type(model).__name__} in {path}, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. Give a state_dict saved with torch.save."
        ) from error


def _try(recipe: Recipe, key: str, network: nn.Module, inputs: Sequence[Tensor], targets: Tensor) -> None:
    try:
        with torch.no_grad():
            outputs = copy.deepcopy(network).eval()(*inputs)
            recipe.task.loss(outputs, targets)
            recipe.task.metrics("").update(outputs, targets)
    except Exception as error:  # whatever the network or the task says to inputs that do not fit
        shapes = " and ".join(f"({', '.join(['N', *map(str, tensor.shape[1:])])})" for tensor in inputs)
        raise DataError(
            f"{key}: expected a network that takes inputs of shape {shapes} and fits the task, "
            f"got {type(error).__name__}: {' '.join(str(error).split())[:300]}. Change {key}.init_args or data."
        ) from error
