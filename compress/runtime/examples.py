"""Inputs that a manifest allows, for calls whose outputs nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from compress.errors import ArtifactError, EngineError
from compress.runtime.engines import Engine
from compress.runtime.manifest import Manifest, TensorSpec
from compress.runtime.sizes import described

__all__ = ["example_call", "example_sizes", "largest_sizes"]

_ANY = 8  # with a single pixel or step most networks do not run, and torch takes one for a constant
_OF_TYPICAL = 16  # a size without a limit of its own may be this much beyond the typical one
_MOST = 2**30  # values of a sample, 4 GiB in float32: a volume of 1024 x 1024 x 1024


def example_sizes(spec: TensorSpec) -> tuple[int, ...]:
    """Return an input's sizes beyond the batch; where any goes, and none is typical, it is eight."""
    typical = {dimension: allowed.typical for dimension, allowed in spec.ranges.items()}
    return tuple(size or typical.get(dimension, _ANY) for dimension, size in enumerate(spec.shape[1:], 1))


def largest_sizes(spec: TensorSpec) -> tuple[int, ...]:
    """Return an input's largest sizes beyond the batch; where any goes, sixteen times the typical one.

    Example:
        >>> from compress.runtime.manifest import Range
        >>> largest_sizes(TensorSpec("x", "float32", (None, 3, None), {2: Range("size2", 2, 9, 4)}))
        (3, 9)
    """
    largest = {dimension: allowed.largest for dimension, allowed in spec.ranges.items()}
    sizes = enumerate(zip(spec.shape[1:], example_sizes(spec)), 1)
    return tuple(size or largest.get(dimension) or _OF_TYPICAL * typical for dimension, (size, typical) in sizes)


def example_call(engine: Engine, manifest: Manifest, batch: int) -> Callable[[], Sequence[Any]]:
    """Return a call that runs an engine on a batch of random inputs, of their typical sizes.

    Raises:
        ArtifactError: when a sample would be larger than any network's.
        EngineError: when the engine's file is of other sizes.
    """
    _check_sizes(engine, manifest)
    generator = np.random.default_rng(0)
    inputs: list[Any] = []
    for spec in manifest.inputs:
        shape = (batch, *example_sizes(spec))
        if "float" in spec.dtype:
            inputs.append(generator.standard_normal(shape, np.float32).astype(spec.dtype, copy=False))
        else:
            inputs.append(np.zeros(shape, spec.dtype))
    if engine.takes != "numpy":
        import torch

        inputs = [torch.from_numpy(array) for array in inputs]
    return lambda: engine(inputs)


def _check_sizes(engine: Engine, manifest: Manifest) -> None:
    """Refuse sizes before memory is asked for: whoever wrote the manifest may have written any."""
    num = sum(abs(prod(example_sizes(spec))) for spec in manifest.inputs)
    if num > _MOST:
        raise ArtifactError(
            f"{manifest.name}: expected inputs of at most {_MOST:,} values a sample, got {num:.3g}. Do not use it."
        )
    taken: Sequence[TensorSpec] = getattr(engine, "inputs", ())  # of engines whose files say so
    for spec, own in zip(manifest.inputs, taken):
        sizes = zip(spec.shape[1:], own.shape[1:])
        if len(spec.shape) != len(own.shape) or any(None not in pair and pair[0] != pair[1] for pair in sizes):
            raise EngineError(
                f"{spec.name}: expected shape {described(own)}, as the engine's file has, got {described(spec)} in the "
                "manifest. Export again."
            )
