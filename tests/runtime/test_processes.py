"""What a serving process imports, and what it can do without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compress.runtime import load
from tests.export.programs import HERE, artifact, quantized, reviews

TORCH_FREE = ("onnxruntime", "openvino")

BLOCK_TORCH = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("blocked")

sys.meta_path.insert(0, Block())
"""

HIDE_TORCH = "import sys; sys.modules['torch'] = None\n"


def run(code: str, tmp_path: Path, *arguments: str) -> str:
    command = [sys.executable, "-W", "always", "-c", code, *arguments]
    environment = {"PATH": "/usr/bin:/bin", "COMPRESS_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    environment["COMPRESS_KEY"] = os.environ["COMPRESS_KEY"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_serving_imports_nothing_that_trains(tmp_path: Path) -> None:
    code = f"""
import sys, numpy, compress
model = compress.load(sys.argv[1])
assert model.engines == {tuple(HERE)}, model.engines
assert model(numpy.zeros((3, 1, 8, 8), numpy.float32)).shape == (3, 3)
heavy = {{"pytorch_lightning", "lightning", "torch_pruning", "torchao", "datasets", "onnx", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
    run(code, tmp_path, str(artifact()))


@pytest.mark.parametrize("prelude", [BLOCK_TORCH, HIDE_TORCH])
@pytest.mark.parametrize("engine", [name for name in HERE if name in TORCH_FREE])
def test_some_engines_serve_where_there_is_no_torch(engine: str, prelude: str, tmp_path: Path) -> None:
    code = f"""{prelude}
import numpy, compress
model = compress.load(sys.argv[1])
assert model.engines == {tuple(name for name in HERE if name in TORCH_FREE)}, model.engines
model = compress.load(sys.argv[1], engine={engine!r})
x = numpy.load(sys.argv[2])
numpy.save(sys.argv[2], model(x))
labels, probabilities = model.predict(x)
assert len(labels) == 150 and model.benchmark((1,), seconds=0.01)[0]["engine"] == {engine!r}
assert sys.modules.get("torch") is None
"""
    inputs = quantized().inputs.numpy()
    np.save(tmp_path / "x.npy", inputs)
    said = run(code, tmp_path, str(artifact()), str(tmp_path / "x.npy"))
    assert "torch is not installed" in said
    assert np.array_equal(np.load(tmp_path / "x.npy"), load(artifact(), engine=engine)(inputs))


def test_texts_are_predicted_where_there_is_no_torch_and_no_transformers(tmp_path: Path) -> None:
    code = f"""{HIDE_TORCH}
sys.modules["transformers"] = None
import json, compress
model = compress.load(sys.argv[1])
assert "tokenizers" not in sys.modules  # imported when the first text comes
print(json.dumps(model.predict(["a fine film", "dull"])[0]))
"""
    assert '["good", "bad"]' in run(code, tmp_path, str(reviews().artifact))
