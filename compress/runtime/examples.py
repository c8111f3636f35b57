"""Inputs that a manifest allows, for calls whose outputs nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from compress.runtime.engines import Engine
from compress.runtime.manifest import Manifest

__all__ = ["example_call"]


def example_call(engine: Engine, manifest: Manifest, batch: int) -> Callable[[], object]:
    """Return a call that runs an engine on a batch of random inputs."""
    generator = np.random.default_rng(0)
    inputs: list[Any] = []
    for spec in manifest.inputs:
        shape = (batch, *(size or 1 for size in spec.shape[1:]))
        values = generator.standard_normal(shape)
        inputs.append(values.astype(spec.dtype) if "float" in spec.dtype else np.zeros(shape, spec.dtype))
    if engine.takes != "numpy":
        import torch

        inputs = [torch.from_numpy(array) for array in inputs]
    return lambda: engine(inputs)
