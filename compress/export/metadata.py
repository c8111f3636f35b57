"""What the caller says of a network, checked before anything is built: an artefact must be one that can be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compress.errors import ArtifactError, ExportError
from compress.export.outputs import Form
from compress.export.targets import TARGETS
from compress.runtime.kinds import check_content
from compress.runtime.manifest import Manifest, TensorSpec, check_text, preprocesses_text
from compress.runtime.text import make_encoder
from compress.runtime.trust import SIGNATURE
from compress.runtime.values import check_labels, check_scaling

__all__ = ["check_names", "checked_metadata"]

_KEYS = ("name", "task", "labels", "preprocessing", "metrics", "history")


def checked_metadata(
    metadata: Mapping[str, Any], inputs: Sequence[TensorSpec], form: Form, files: Mapping[str, str]
) -> dict[str, Any]:
    """Return metadata as a manifest holds it.

    Args:
        metadata: ``name, task, labels, preprocessing, metrics, history``, or some of them. Numbers may be numpy's or
            tensors of one element.
        inputs: Of the program.
        form: Of its outputs.
        files: Texts of the files that preprocessing names, by their names.

    Raises:
        ExportError: when a manifest cannot hold them, or they do not fit the network.
    """
    if unknown := sorted(set(metadata) - set(_KEYS)):
        raise ExportError(f"metadata: expected keys among {', '.join(_KEYS)}, got {', '.join(unknown)}. Rename it.")
    empty = asdict(Manifest(name="", created="", task="", inputs=(), outputs=(), targets={}))
    try:
        content = json.loads(json.dumps({**empty, **metadata}, default=_number))
        check_content(content)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ExportError(f"metadata: expected what a manifest holds, got {error}. Change it.") from error
    try:
        check_labels(content["labels"], form.scores.shape)
    except ValueError as error:
        raise ExportError(f"labels: expected a name for each class, got {error}. Name all, or none.") from error
    _check_preprocessing(content["preprocessing"] or {}, inputs, files)
    return {key: content[key] for key in metadata}


def check_names(names: Sequence[str]) -> None:
    """Make sure that files can be put into an artefact beside its own, those of targets to come included.

    Raises:
        ExportError: when one cannot.
    """
    outside = [name for name in names if not Path(name).name or {*name} & {*"/\\\0"} or name == ".."]
    if outside:
        found = ", ".join(map(repr, outside))
        raise ExportError(f"files: expected names within the artefact, got {found}. Leave out folders.")
    targets = map(import_module, TARGETS.values())
    own = {"manifest.json", SIGNATURE, *(name for each in targets for name in (each.FILE, *getattr(each, "PARTS", ())))}
    if taken := [name for name in names if name.lower() in own]:  # some file systems know no capitals
        raise ExportError(f"files: expected names that the artefact does not use, got {', '.join(taken)}. Rename them.")


def _number(value: Any) -> Any:
    """Return the number that an object holds."""
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.shape == ():
        return value.item()
    raise TypeError(f"{type(value).__name__} is not one of JSON's kinds")


def _check_preprocessing(steps: Mapping[str, Any], inputs: Sequence[TensorSpec], files: Mapping[str, str]) -> None:
    if not steps:
        return
    try:
        if preprocesses_text(steps):
            check_text(steps, inputs, files)
            make_encoder(files[steps["tokenizer"]], steps)([""])
        else:
            check_scaling(steps, inputs[0].shape)
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"preprocessing: expected what turns {'texts' if preprocesses_text(steps) else 'stored values'} into the "
            f"network's inputs, got {type(error).__name__}: {error}. See compress.data.Tokenizer or Digits."
        ) from error
