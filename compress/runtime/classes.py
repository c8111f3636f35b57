"""Whether a network's outputs are scores of classes, of which labels can be predicted."""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.errors import ArtifactError
from compress.runtime.inputs import numbers_of
from compress.runtime.manifest import Manifest
from compress.runtime.sizes import described
from compress.runtime.values import class_output

__all__ = ["check_classes", "check_scores", "scores"]

_NOT_ONE_OF_SEVERAL = ("multilabel", "regression")  # tasks, whose outputs have such a shape, too


def check_classes(manifest: Manifest) -> None:
    """Make sure that a network gives each sample one of several classes.

    Args:
        manifest: Of the artefact.

    Raises:
        ArtifactError: when its output, of several the one called ``logits``, else the first, is not of shape
            (N, classes), or the task another.
    """
    output, task = manifest.outputs[_place(manifest)], manifest.task
    if len(output.shape) != 2 or (output.shape[1] or 0) < 2 or task in _NOT_ONE_OF_SEVERAL:
        which = "" if manifest.structure is None else f" of {output.name!r}"
        raise ArtifactError(
            f"{manifest.name}: expected an output of shape (N, classes) to predict a label of each sample, got "
            f"{described(output)}{which} for the task {task!r}. Call the model itself, "
            "compress.load(ARTIFACT)(inputs), for its outputs as they are."
        )


def check_scores(logits: np.ndarray, manifest: Manifest) -> None:
    """Make sure that every sample has a class that is more likely than others; some may have a score of minus infinity.

    Args:
        logits: Shape (N, classes).
        manifest: Of the artefact.

    Raises:
        ArtifactError: when a score is NaN or infinity, or all of a sample are minus infinity.
    """
    known = np.isfinite(logits.max(-1))  # NaN where one is
    if not known.all():
        raise ArtifactError(
            f"{manifest.name}: expected finite scores of classes, got {logits.max(-1)[~known][0]} for samples "
            f"{numbers_of(~known)}. Look at their values: the network was trained with others."
        )


def scores(outputs: Any, manifest: Manifest) -> Any:
    """Return the scores of classes among a model's outputs.

    Args:
        outputs: As a call gives them: an array, or a tuple or dict of such.
        manifest: Of the artefact.

    Returns:
        Of several the one called ``logits``, else the first, shape (N, classes).
    """
    if manifest.structure is None:
        return outputs
    place = _place(manifest)
    return outputs[manifest.outputs[place].name if manifest.structure == "dict" else place]


def _place(manifest: Manifest) -> int:
    return class_output([spec.name for spec in manifest.outputs])
