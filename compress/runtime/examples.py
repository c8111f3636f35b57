"""Inputs that a manifest allows, for calls whose outputs nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compress.runtime.engines import Engine
from compress.runtime.manifest import Manifest, TensorSpec

__all__ = ["example_call", "example_sizes"]

_ANY = 8  # with a single pixel or step most networks do not run, and torch takes one for a constant


def example_sizes(spec: TensorSpec) -> tuple[int, ...]:
    """Return an input's sizes beyond the batch; where any goes, and none is typical, it is eight."""
    typical = {dimension: allowed.typical for dimension, allowed in spec.ranges.items()}
    return tuple(size or typical.get(dimension, _ANY) for dimension, size in enumerate(spec.shape[1:], 1))


def example_call(engine: Engine, manifest: Manifest, batch: int) -> Callable[[], Sequence[Any]]:
    """Return a call that runs an engine on a batch of random inputs, of their typical sizes."""
    generator = np.random.default_rng(0)
    inputs: list[Any] = []
    for spec in manifest.inputs:
        shape = (batch, *example_sizes(spec))
        values = generator.standard_normal(shape)
        inputs.append(values.astype(spec.dtype) if "float" in spec.dtype else np.zeros(shape, spec.dtype))
    if engine.takes != "numpy":
        import torch

        inputs = [torch.from_numpy(array) for array in inputs]
    return lambda: engine(inputs)
