from __future__ import annotations

from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.errors import ExportSkippedError
from compress.export import Gates, export_artifact
from compress.export.parity import check_parity, reference_outputs
from compress.export.targets import litert
from compress.runtime import load
from compress.runtime.engines import make_engine
from compress.surgery.capture import export_program
from tests.export.networks import KINDS, network
from tests.export.programs import floating, quantized

pytest.importorskip("litert_torch", reason="the extra `litert` is not installed")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_module(kind: str, tmp_path: Path) -> None:
    made = network(kind)
    for name, program, module, limit in (
        ("floats", made.program, made.reference, 1e-5),
        ("integers", made.integers, made.prepared, 0.02),
    ):
        path = tmp_path / f"{name}.tflite"
        census = litert.build(program, path)
        wanted = reference_outputs(module, [made.inputs])
        found = check_parity(make_engine("litert", path), wanted, [made.inputs])
        assert found.batches.relative_error < limit, found.batches
        assert found.singles.relative_error < limit, found.singles
        if name == "floats":
            assert (census.int8_kernels, census.conversions) == (0, 0)


def test_convolutions_of_a_residual_net_become_integer_kernels(tmp_path: Path) -> None:
    trained = quantized()
    path = tmp_path / litert.FILE
    census = litert.build(trained.program, path)
    # What comes out of the last layer is not quantised.
    assert census.details == {"CONV_2D int8": 5, "DEPTHWISE_CONV_2D int8": 1, "FULLY_CONNECTED float32": 1}
    engine = make_engine("litert", path, num_threads=1)
    assert engine.threads == 1
    parts = [np.ascontiguousarray(trained.inputs[i : i + 10].numpy()) for i in range(0, 60, 10)]
    wanted = [engine([part])[0] for part in parts]
    found: dict[int, np.ndarray] = {}

    def serve(i: int) -> None:
        found[i] = engine([parts[i]])[0]

    threads = [Thread(target=serve, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, each in enumerate(wanted):
        np.testing.assert_array_equal(found[i], each)


def test_an_artefact_serves(tmp_path: Path) -> None:
    trained = floating()
    export_artifact(
        trained.program,
        tmp_path / "artifact",
        targets=["litert"],
        reference=trained.reference,
        held_out=[trained.inputs],
        gates=Gates(),
    )
    model = load(tmp_path / "artifact", engine="litert")
    with torch.no_grad():
        wanted = trained.reference(trained.inputs[:7])
    torch.testing.assert_close(model(trained.inputs[:7]), wanted, atol=1e-4, rtol=1e-4)


class Determinant(nn.Module):
    """An operator that LiteRT does not take."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


def test_what_litert_does_not_take_is_left_out_with_a_reason(tmp_path: Path) -> None:
    program = export_program(Determinant(), [torch.randn(2, 3, 3)])
    with pytest.raises(ExportSkippedError, match=r"litert: expected a program that it converts, got: "):
        litert.build(program, tmp_path / litert.FILE)
    assert not (tmp_path / litert.FILE).exists()
