"""What every target must do, checked alike."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from compress.export import Gates, export_artifact
from compress.export.parity import check_parity, reference_outputs
from compress.export.targets import Census
from compress.runtime import CompactModel, load
from compress.runtime.engines import Engine, make_engine
from tests.export.networks import network
from tests.export.programs import Trained

__all__ = ["Determinant", "check_outputs", "check_serving", "check_threads"]


class Determinant(nn.Module):
    """An operator that ONNX has and hardly an engine takes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


def check_outputs(target: ModuleType, engine: str, kind: str, folder: Path) -> dict[str, Census]:
    """Build floats and integers of a kind of network, hold both against their modules, and return what was counted."""
    made = network(kind)
    counted = {}
    for name, program, module, limit in (
        ("floats", made.program, made.reference, 1e-5),
        ("integers", made.integers, made.prepared, 0.02),
    ):
        (folder / name).mkdir()
        path = folder / name / target.FILE
        counted[name] = target.build(program, path)
        wanted = reference_outputs(module, [made.inputs])
        found = check_parity(make_engine(engine, path), wanted, [made.inputs])
        assert found.batches.relative_error < limit, found.batches
        assert found.singles.relative_error < limit, found.singles
    return counted


def check_threads(engine: Engine, inputs: Tensor) -> None:
    """Let several threads call an engine at once, again and again: each gets what it would get alone."""
    parts = [np.ascontiguousarray(inputs[i : i + 10].numpy()) for i in range(0, 60, 10)]
    wanted = [engine([part])[0] for part in parts]
    found: dict[int, list[np.ndarray]] = {}

    def serve(i: int) -> None:
        found[i] = [engine([parts[i]])[0] for _ in range(20)]

    threads = [Thread(target=serve, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(parts)
    for i, each in enumerate(wanted):
        for outputs in found[i]:
            np.testing.assert_array_equal(outputs, each)


def check_serving(engine: str, trained: Trained, folder: Path) -> CompactModel:
    """Export floats for an engine and serve them; return what serves."""
    export_artifact(
        trained.program,
        folder / "artifact",
        targets=[engine],
        reference=trained.reference,
        held_out=[trained.inputs],
        gates=Gates(),
    )
    model = load(folder / "artifact", engine=engine)
    with torch.no_grad():
        wanted = trained.reference(trained.inputs[:7])
    torch.testing.assert_close(model(trained.inputs[:7]), wanted, atol=1e-4, rtol=1e-4)
    return model
