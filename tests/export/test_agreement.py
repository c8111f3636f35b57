"""What the manifest says of each engine's agreement, against what one gets by hand from the files that are served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.export import Gates, export_artifact
from compress.runtime import load
from compress.runtime.manifest import Manifest, read_manifest
from tests.export.programs import HERE, artifact, quantized


def trained(x: Tensor) -> Tensor:
    """Return the outputs of the fake-quantised network."""
    outputs: Tensor = quantized().reference.eval()(x)
    return outputs


def another(x: Tensor) -> Tensor:
    """Return outputs that are far off, for every other image or so with another class in front."""
    outputs = 1.1 * trained(x)
    return torch.where(x[:, 0, :1, 0] > 0, outputs, outputs.roll(1, 1))


def by_hand(run: Any, reference: Any) -> dict[str, float]:
    with torch.no_grad():
        pairs = [(reference(x), torch.as_tensor(run(x))) for x in quantized().inputs.split(63)]
    wanted, outputs = (torch.cat(column).numpy() for column in zip(*pairs))
    return {
        "max_abs_error": float(np.abs(wanted - outputs).max()),
        "relative_error": float(np.sqrt(((wanted - outputs) ** 2).sum() / (wanted**2).sum())),
        "top1_agreement": float(np.mean(wanted.argmax(1) == outputs.argmax(1))),
        "num_samples": len(outputs),
    }


def check(manifest: Manifest, folder: Path, reference: Any) -> None:
    """Hold all that a manifest says of agreement against what one gets by hand."""
    # Sums in another order differ by less than this; an integer more or less by far more.
    close: Any = {"abs": 1e-6, "rel": 1e-5}
    assert manifest.agreement == pytest.approx(by_hand(quantized().program.module(), reference), **close)
    for name, target in manifest.targets.items():
        assert target.agreement == pytest.approx(by_hand(load(folder, "cpu", engine=name), reference), **close), name


def test_of_every_engine_and_of_the_program_with_the_network_that_was_trained() -> None:
    manifest = read_manifest(artifact())
    assert [*manifest.targets, *manifest.skipped] == HERE
    check(manifest, artifact(), trained)
    for entry in (manifest.agreement, *(target.agreement for target in manifest.targets.values())):
        assert entry["top1_agreement"] >= 0.95
        assert entry["relative_error"] < 0.1


def test_of_outputs_that_are_far_off(tmp_path: Path) -> None:
    manifest = export_artifact(
        quantized().program,
        tmp_path / "a",
        targets=["eager", "onnxruntime"],
        reference=another,
        held_out=[quantized().inputs],
        scheme="int8",
        gates=Gates(max_relative_error=9, min_top1_agreement=0),
    )
    check(manifest, tmp_path / "a", another)
    for entry in (manifest.agreement, *(target.agreement for target in manifest.targets.values())):
        assert 0.2 < entry["top1_agreement"] < 0.95
        assert entry["max_abs_error"] > 1
