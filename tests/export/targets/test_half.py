from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import ExportError
from compress.export import TARGETS, ExportSkippedError, convert, export_artifact
from compress.export.parity import check_parity, reference_outputs
from compress.export.targets import aoti_bf16
from compress.runtime import load
from compress.runtime.engines import make_engine
from compress.surgery.capture import export_program
from tests.export.programs import floating, quantized

HALVES = [name for name in TARGETS if "bf16" in name or "fp16" in name]


def test_bfloat16_on_the_cpu_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti_bf16, "has_bf16", lambda: True)  # where it is emulated, the numbers are the same
    program, reference, inputs = floating()
    path = tmp_path / aoti_bf16.FILE
    assert aoti_bf16.build(program, path).float_kernels >= 7
    found = check_parity(make_engine("aoti_bf16", path), reference_outputs(reference, [inputs]), [inputs])
    assert 1e-4 < found.batches.relative_error < 0.02
    assert found.singles.relative_error < 0.02


def test_a_processor_without_bfloat16_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti_bf16, "has_bf16", lambda: False)
    with pytest.raises(ExportSkippedError, match="aoti_bf16: expected a processor with instructions for bfloat16"):
        aoti_bf16.build(floating().program, tmp_path / aoti_bf16.FILE)


@pytest.mark.parametrize("name", HALVES)
def test_integers_are_not_halved(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti_bf16, "has_bf16", lambda: True)
    with pytest.raises(ExportSkippedError, match="expected a network in floats, got a quantised one"):
        import_module(TARGETS[name]).build(quantized().program, tmp_path / "file")


@pytest.mark.parametrize("name", [name for name in TARGETS if name.startswith(("aoti_cuda", "inductor_cuda"))])
def test_without_a_gpu_nothing_is_compiled_for_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportSkippedError, match="_cuda: expected a GPU that CUDA sees, got none"):
        import_module(TARGETS[name]).build(floating().program, tmp_path / "file")


def test_a_batch_that_is_filled_up_must_not_change_its_samples(tmp_path: Path) -> None:
    class Ranged(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.amax()

    with pytest.raises(ExportSkippedError, match="aoti_cuda: expected a network whose samples do not see each other"):
        import_module(TARGETS["aoti_cuda"]).build(export_program(Ranged(), [torch.ones(2, 3)]), tmp_path / "file")


def test_portable_halves_are_built_and_checked_without_a_gpu(tmp_path: Path) -> None:
    program, reference, inputs = floating()
    path = tmp_path / "small"
    export_artifact(program, path, targets=["eager", "cuda_fp16"], reference=reference, held_out=[inputs])
    targets = convert(path, ["cuda_bf16"]).targets
    assert targets["cuda_fp16"].bytes < targets["eager"].bytes
    assert 1e-5 < targets["cuda_fp16"].agreement["relative_error"] < 5e-3
    assert 1e-4 < targets["cuda_bf16"].agreement["relative_error"] < 5e-2
    model = load(path)
    assert model.engines == ("eager",)
    np.testing.assert_allclose(model(inputs[:5]), reference(inputs[:5]).detach(), atol=1e-4)


def test_half_precision_must_pass_the_gates(tmp_path: Path) -> None:
    program, reference, inputs = floating()

    def other(x: torch.Tensor) -> torch.Tensor:
        return -reference(x)

    with pytest.raises(ExportError, match=r"cuda_fp16: expected a relative error of at most 0.1 .*, got 2"):
        export_artifact(program, tmp_path / "small", targets=["cuda_fp16"], reference=other, held_out=[inputs])
    assert not (tmp_path / "small").exists()
