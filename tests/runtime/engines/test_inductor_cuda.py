"""What Inductor compiles, kept in a file and loaded by another process: on the CPU the same code is at work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.errors import EngineError
from compress.export.targets import inductor_cuda
from compress.export.targets.inductor_cuda import compile_artifact
from compress.runtime.engines.inductor_cuda import load_artifact, make
from compress.surgery.capture import export_program

LOAD = """
import sys
import torch
from pathlib import Path
from compress.runtime.engines.inductor_cuda import load_artifact
inputs, wanted = torch.load(sys.argv[2], weights_only=True)
run = load_artifact(Path(sys.argv[1]), "cpu")
with torch.no_grad():
    for num in (1, 3, 7, len(inputs)):
        assert torch.allclose(run([inputs[:num]])[0], wanted[:num], rtol=1e-4, atol=1e-5), num
"""


@pytest.mark.slow  # compiles and loads in processes that share nothing
def test_another_process_runs_what_was_compiled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
    inputs = torch.randn(20, 2, 6, 6)
    census = compile_artifact(export_program(reference, [inputs[:4]]), tmp_path / "file.pt")
    assert census.float_kernels == 2, census
    with torch.no_grad():
        wanted = reference(inputs)
        assert torch.allclose(load_artifact(tmp_path / "file.pt", "cpu")([inputs])[0], wanted, rtol=1e-4, atol=1e-5)
    assert torch.load(tmp_path / "file.pt", weights_only=True)["largest_batch"] == 2**30 // (4 * 2 * 6 * 6) * 4
    torch.save((inputs, wanted), tmp_path / "expected.pt")
    words = [sys.executable, "-c", LOAD, str(tmp_path / "file.pt"), str(tmp_path / "expected.pt")]
    subprocess.run(words, check=True, env={"PATH": "/usr/bin:/bin", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "other")})


def test_a_batch_with_more_numbers_than_its_kernels_count_goes_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor_cuda, "_LARGEST_TENSOR", 12 * 8)  # the inputs' numbers, four at a time
    reference = nn.Linear(8, 4).eval()
    program, inputs = export_program(reference, [torch.ones(4, 8)]), torch.randn(30, 8)
    compile_artifact(program, tmp_path / "file.pt")
    assert torch.load(tmp_path / "file.pt", weights_only=True)["largest_batch"] == 12
    with torch.no_grad():
        torch.testing.assert_close(load_artifact(tmp_path / "file.pt", "cpu")([inputs])[0], reference(inputs))


def test_another_gpu_than_the_first_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(EngineError, match=r"expected the first GPU, .*, got number 1\. Choose one by CUDA_VISIBLE"):
        make(tmp_path / "compiled.bin", None)
