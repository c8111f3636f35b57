from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress.export.targets import eager
from tests.export.networks import network
from tests.export.programs import quantized


def test_a_fresh_process_runs_it_without_torchao_and_gives_the_same(tmp_path: Path) -> None:
    trained = quantized()
    path = tmp_path / eager.FILE
    eager.build(trained.program, path)
    np.save(tmp_path / "x.npy", trained.inputs.numpy())
    code = (
        "import sys, numpy, torch; x = torch.from_numpy(numpy.load(sys.argv[2]));"
        "y = torch.export.load(sys.argv[1]).module()(x);"
        "assert not hasattr(torch.ops.quantized_decomposed, 'quantize_per_tensor');"
        "assert 'torchao' not in sys.modules;"
        "numpy.save(sys.argv[2], y.detach().numpy())"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "x.npy")], check=True)
    with torch.no_grad():
        wanted = trained.program.module()(trained.inputs).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), wanted, rtol=0, atol=1e-6)


def test_the_file_holds_integers_and_neither_inputs_nor_float_weights(tmp_path: Path) -> None:
    path = tmp_path / eager.FILE
    eager.build(quantized().program, path)
    program = torch.export.load(path)
    weights = [tensor for tensor in program.state_dict.values() if tensor.dim() > 1]
    assert weights
    assert {tensor.dtype for tensor in weights} == {torch.int8}
    assert program.example_inputs is None
    with zipfile.ZipFile(path) as archive:
        assert not any(b"site-packages" in archive.read(name) for name in archive.namelist())


def test_attention_runs_by_whatever_kernel_there_is(tmp_path: Path) -> None:
    made = network("transformer")
    eager.build(made.program, tmp_path / eager.FILE)
    program = torch.export.load(tmp_path / eager.FILE).module()
    with torch.no_grad():
        wanted = made.reference(made.inputs)
        for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                torch.testing.assert_close(program(made.inputs), wanted)
