"""Whether a network's outputs are scores of classes, of which labels can be predicted."""

from __future__ import annotations

from compress.errors import ArtifactError
from compress.runtime.manifest import Manifest
from compress.runtime.sizes import described

__all__ = ["check_classes"]

_NOT_ONE_OF_SEVERAL = ("multilabel", "regression")  # tasks, whose outputs have such a shape, too


def check_classes(manifest: Manifest) -> None:
    """Make sure that a network gives each sample one of several classes.

    Args:
        manifest: Of the artefact.

    Raises:
        ArtifactError: when its output is not of shape (N, classes), or the task another.
    """
    output, task = manifest.outputs[0], manifest.task
    if len(output.shape) != 2 or (output.shape[1] or 0) < 2 or task in _NOT_ONE_OF_SEVERAL:
        raise ArtifactError(
            f"{manifest.name}: expected an output of shape (N, classes) to predict a label of each sample, got "
            f"{described(output)} for the task {task!r}. Call the model itself, compress.load(ARTIFACT)(inputs), for "
            "its outputs as they are."
        )
