"""Artefacts are served where there are ONNX Runtime, numpy, tokenizers, and this package without its dependencies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.export.programs import LABELS, artifact, quantized, reviews

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


TEXTS = """
import json, sys
import compress.runtime
model = compress.runtime.load(sys.argv[1])
print(json.dumps({"labels": model.predict(sys.argv[2:])[0], "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the Python of a fresh environment."""
    folder = tmp_path_factory.mktemp("fresh")
    python = str(folder / "venv" / "bin" / "python")
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    run([python, "-m", "pip", "install", "-q", "onnxruntime", "numpy", "tokenizers"])
    run([python, "-m", "pip", "install", "-q", "--no-deps", str(ROOT)])
    installed = run([python, "-m", "pip", "list"]).lower()
    assert "torch" not in installed
    assert "transformers" not in installed
    return python


@pytest.mark.slow  # installs packages
def test_a_fresh_environment_without_torch_serves(python: str, tmp_path: Path) -> None:
    inputs = quantized().inputs[:9]
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    found = json.loads(run([python, "-W", "ignore", "-c", SERVE, str(artifact()), str(tmp_path / "inputs.npy")]))
    assert (found["engine"], found["torch"]) == ("onnxruntime", False)
    assert set(found["labels"]) <= set(LABELS)
    with torch.no_grad():
        wanted = quantized().reference(inputs)
    assert torch.linalg.norm(torch.tensor(found["outputs"]) - wanted) < 0.05 * torch.linalg.norm(wanted)
    print("import compress.runtime beyond onnxruntime:", found["seconds"])


@pytest.mark.slow  # installs packages
def test_a_fresh_environment_without_torch_and_transformers_reads_texts(python: str) -> None:
    found = json.loads(run([python, "-W", "ignore", "-c", TEXTS, str(reviews().artifact), "a fine film", "dull"]))
    assert found == {"labels": ["good", "bad"], "torch": False}


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout
