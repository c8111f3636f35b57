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
from compress.export.targets import tvm
from compress.runtime import load
from compress.runtime.engines import make_engine
from compress.runtime.requirements import why_not
from compress.surgery.capture import export_program
from tests.export.networks import KINDS, network
from tests.export.programs import floating

pytest.importorskip("tvm", reason="the extra `tvm` is not installed")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_module(kind: str, tmp_path: Path) -> None:
    made = network(kind)
    for name, program, module, limit in (
        ("floats", made.program, made.reference, 1e-5),
        ("integers", made.integers, made.prepared, 0.02),
    ):
        path = tmp_path / f"{name}.so"
        census = tvm.build(program, path)
        wanted = reference_outputs(module, [made.inputs])
        found = check_parity(make_engine("tvm", path), wanted, [made.inputs])
        assert found.batches.relative_error < limit, found.batches
        assert found.singles.relative_error < limit, found.singles
        assert census.int8_kernels == 0
        assert census.float_kernels > 0


def test_threads_have_machines_of_their_own(tmp_path: Path) -> None:
    trained = floating()
    tvm.build(trained.program, tmp_path / tvm.FILE)
    engine = make_engine("tvm", tmp_path / tvm.FILE, num_threads=1)
    assert engine.threads == 1
    parts = [np.ascontiguousarray(trained.inputs[i : i + 10].numpy()) for i in range(0, 60, 10)]
    wanted = [engine([part])[0] for part in parts]
    found: dict[int, np.ndarray] = {}

    def serve(i: int) -> None:
        for _ in range(20):
            found[i] = engine([parts[i]])[0]

    threads = [Thread(target=serve, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, each in enumerate(wanted):
        np.testing.assert_array_equal(found[i], each)


def test_an_artefact_serves_and_says_what_it_needs(tmp_path: Path) -> None:
    trained = floating()
    manifest = export_artifact(
        trained.program,
        tmp_path / "artifact",
        targets=["tvm"],
        reference=trained.reference,
        held_out=[trained.inputs],
        gates=Gates(),
    )
    target = manifest.targets["tvm"]
    assert "torch" not in target.requires
    assert why_not(target.requires) is None
    assert "built with apache-tvm 0.1" in str(why_not({**target.requires, "versions": {"apache-tvm": "0.1"}}))
    model = load(tmp_path / "artifact", engine="tvm")
    with torch.no_grad():
        wanted = trained.reference(trained.inputs[:7])
    torch.testing.assert_close(model(trained.inputs[:7]), wanted, atol=1e-4, rtol=1e-4)


class Determinant(nn.Module):
    """An operator that ONNX has and TVM does not take."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


def test_what_tvm_does_not_take_is_left_out_with_a_reason(tmp_path: Path) -> None:
    program = export_program(Determinant(), [torch.randn(2, 3, 3)])
    with pytest.raises(ExportSkippedError, match=r"tvm: expected a program that TVM compiles, got: "):
        tvm.build(program, tmp_path / tvm.FILE)
    assert not (tmp_path / tvm.FILE).exists()
