"""What an artefact's engines really compute in integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from compress.export.products import Product, int8_macs
from compress.export.targets import INTEGER_ATTENTION, TARGETS, Census
from compress.runtime.engines import missing_package
from compress.runtime.manifest import check_file, read_manifest

__all__ = ["census", "with_macs"]


def census(artifact: str | Path) -> dict[str, Census]:
    """Count the kernels of each engine that compiles.

    ONNX Runtime and OpenVINO optimise their files anew and say what they made of them. Of packages that hold machine
    code, and of engines that are not installed here, it is what was counted while they were built.

    Args:
        artifact: The artefact's directory; its files are checked first.

    Returns:
        By engine; those that run a program node by node are left out.

    Raises:
        ArtifactError: when the artefact is damaged.
    """
    manifest = read_manifest(artifact)
    found = {}
    for engine, target in manifest.targets.items():
        path = check_file(Path(artifact), target)
        recorded = Census(**target.census) if target.census else None
        count = getattr(import_module(TARGETS[engine]), "census", None) if engine in TARGETS else None
        if count is not None and missing_package(engine) is None:
            recorded = with_macs(count(path), [Product(**product) for product in manifest.products], engine)
        if recorded is not None:
            found[engine] = recorded
    return found


def with_macs(counted: Census | None, found: Sequence[Product], engine: str) -> Census | None:
    """Say of counted kernels how much of the work they are certain to do in integers.

    Args:
        counted: The kernels, where the engine compiles.
        found: The products of the program that was lowered.
        engine: Whose kernels.
    """
    if counted is None:
        return None
    if engine not in INTEGER_ATTENTION:
        found = [replace(product, quantized=product.quantized and not product.of_activations) for product in found]
    done = int8_macs(found, int8_kernels=counted.int8_kernels, float_kernels=counted.float_kernels)
    return replace(counted, int8_macs=done, macs=sum(product.macs for product in found))
