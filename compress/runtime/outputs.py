"""Calls of an engine with arrays or tensors alike, and its outputs in the structure in which the network gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from compress.errors import EngineError
from compress.runtime.engines import Engine
from compress.runtime.manifest import Manifest
from compress.runtime.sizes import described

__all__ = ["arranger", "call", "check_outputs", "join", "kind_of"]


def arranger(structure: str | None, names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """Return what puts a list of outputs into a manifest's structure.

    Args:
        structure: ``"tuple"``, ``"dict"``, or ``None`` for the only output by itself.
        names: Of the outputs, in order.

    Example:
        >>> arranger("dict", ["logits", "boxes"])([1, 2]), arranger("tuple", "ab")([1, 2]), arranger(None, "a")([1])
        ({'logits': 1, 'boxes': 2}, (1, 2), 1)
    """
    if structure is None:
        return itemgetter(0)
    return tuple if structure == "tuple" else lambda found: dict(zip(names, found))


def call(engine: Engine, inputs: Sequence[Any]) -> list[Any]:
    """Run a batch.

    Args:
        engine: Whatever it takes.
        inputs: Arrays, or tensors on any device, of shape (N, ...) each.

    Returns:
        The outputs, shape (N, ...) each: arrays for arrays, tensors on the inputs' device for tensors.
    """
    given = kind_of(inputs[0])
    if given == "numpy" and engine.takes == "numpy":
        return engine(inputs)
    import torch

    if given == "numpy":
        # torch cannot share memory that is read-only or runs backwards.
        tensors = [torch.from_numpy(np.require(value, requirements=["C", "W"])) for value in inputs]
        return [value.numpy() for value in engine(tensors)]
    if engine.takes == "cuda":
        return engine(inputs)
    device = inputs[0].device
    tensors = [value.detach().cpu() for value in inputs]
    if engine.takes == "torch":
        return [value.to(device) for value in engine(tensors)]
    return [torch.from_numpy(value).to(device) for value in engine([tensor.numpy() for tensor in tensors])]


def join(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the outputs of a batch that was run in parts.

    Args:
        parts: The outputs of each, arrays or tensors.
    """
    if kind_of(parts[0][0]) == "numpy":
        return [np.concatenate(each) for each in zip(*parts)]
    import torch

    return [torch.cat(each) for each in zip(*parts)]


def kind_of(value: Any) -> str:
    """Return ``"numpy"`` of an array, ``"torch"`` of a tensor, and the type's name of anything else."""
    if isinstance(value, np.ndarray):
        return "numpy"
    # Without importing torch: it need not be installed.
    return "torch" if hasattr(value, "detach") else type(value).__name__


def check_outputs(outputs: Sequence[Any], manifest: Manifest, engine: str) -> None:
    """Make sure that an engine gives the outputs that the manifest names, of their shapes and dtypes.

    Args:
        outputs: What it gave.
        manifest: Of its artefact.
        engine: Its name.

    Raises:
        EngineError: when it does not.
    """
    if len(outputs) != len(manifest.outputs):
        names = ", ".join(spec.name for spec in manifest.outputs)
        raise EngineError(
            f"{manifest.name}: expected {len(manifest.outputs)} outputs of {engine} ({names}), got {len(outputs)}. "
            "Export again."
        )
    for spec, value in zip(manifest.outputs, outputs):
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        fits = len(shape) == len(spec.shape) and all(wanted in (None, size) for wanted, size in zip(spec.shape, shape))
        if not fits or dtype != spec.dtype:
            raise EngineError(
                f"{manifest.name}: expected {spec.name} of {engine} as {spec.dtype} of shape {described(spec)}, got "
                f"{dtype} of shape {shape}. Export again."
            )
