"""An artefact is served in an environment with ONNX Runtime, numpy and this package without its dependencies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.export.programs import LABELS, artifact, quantized

ROOT = Path(__file__).parent.parent.parent

SERVE = """
import json, sys, time
import numpy as np
import onnxruntime
before = set(sys.modules)
start = time.perf_counter()
import compress.runtime
seconds = time.perf_counter() - start
model = compress.runtime.load(sys.argv[1])
inputs = np.load(sys.argv[2])
labels, _ = model.predict(inputs)
print(json.dumps({"engine": model.engine, "outputs": model(inputs).tolist(), "labels": labels, "seconds": seconds,
                  "torch": "torch" in sys.modules}))
"""


@pytest.mark.slow  # installs packages
def test_a_fresh_environment_without_torch_serves(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")])
    run([str(python), "-m", "pip", "install", "-q", "onnxruntime", "numpy"])
    run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(ROOT)])
    assert "torch" not in run([str(python), "-m", "pip", "list"]).lower()
    inputs = quantized().inputs[:9]
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    found = json.loads(run([str(python), "-W", "ignore", "-c", SERVE, str(artifact()), str(tmp_path / "inputs.npy")]))
    assert (found["engine"], found["torch"]) == ("onnxruntime", False)
    assert set(found["labels"]) <= set(LABELS)
    with torch.no_grad():
        wanted = quantized().reference(inputs)
    assert torch.linalg.norm(torch.tensor(found["outputs"]) - wanted) < 0.05 * torch.linalg.norm(wanted)
    print("import compress.runtime beyond onnxruntime:", found["seconds"])


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout
