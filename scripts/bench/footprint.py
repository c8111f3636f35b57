"""What serving costs before the first answer: the time of the import and of loading, and resident memory.

Each figure is the median over fresh processes, which take turns; memory is what is resident at the end of each. An
engine is ``loaded`` with an artefact of ResNet-18 (224 x 224, float32), one thread, and one sample predicted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import Row, finish, options
from quantize_networks import Sizes, make

from compress.export import Gates, export_artifact
from compress.runtime.engines import missing_package
from compress.surgery.capture import export_program

_ENGINES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "eager": "torch", "aoti": "torch"}
_MEASURE = """
import json, pathlib, re, time
{before}
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
memory = re.search(r"VmRSS:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())
print(json.dumps([seconds, int(memory[1]) / 1024]))
"""
_OURS = "import compress.runtime; compress.runtime.load"  # its names are imported when they are asked for
_LOADED = """
model = compress.runtime.load({path!r}, engine={engine!r}, num_threads=1)
model(numpy.zeros((1, *model.manifest.inputs[0].shape[1:]), numpy.float32))
"""


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    engines = [name for name in _ENGINES if missing_package(name) is None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        sizes = _export(path, engines, quick=arguments.quick)
        cases = {"import numpy": ("pass", "import numpy")}
        for package in dict.fromkeys(_ENGINES[engine] for engine in engines):
            cases[f"import {package}"] = ("import numpy", f"import {package}")
            cases[f"import compress.runtime after {package}"] = (f"import numpy, {package}", _OURS)
        for engine in engines:
            before = f"import numpy, {_ENGINES[engine]}, compress.runtime"
            cases[f"{engine} loaded"] = (before, _LOADED.format(path=str(path), engine=engine))
        found: dict[str, list[list[float]]] = {name: [] for name in cases}
        for _ in range(2 if arguments.quick else 6):  # the first round fills the caches of files
            for name, (before, code) in cases.items():
                found[name].append(_measured(_MEASURE.format(before=before, code=code), folder))
    rows = []
    for name, measured in found.items():
        seconds, memory = (statistics.median(values) for values in zip(*measured[1:]))
        note = f"{sizes[name.split()[0]] / 2**20:.0f} MiB of files" if name.endswith("loaded") else ""
        rows += [Row(name, "time", 1e3 * seconds, "ms", note), Row(name, "resident memory", memory, "MiB", note)]
    finish(arguments, rows)


def _measured(code: str, cache: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COMPRESS_CACHE": cache},
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _export(path: Path, engines: list[str], *, quick: bool) -> dict[str, int]:
    network, inputs = make("resnet18", Sizes(image=64) if quick else Sizes())
    network.eval()
    x = inputs(2)
    gates = Gates(max_relative_error=1.0, min_top1_agreement=0.0)
    program = export_program(network, (x,))
    with torch.no_grad():
        manifest = export_artifact(program, path, targets=engines, reference=network, held_out=(x,), gates=gates)
    return {name: target.bytes for name, target in manifest.targets.items()}


if __name__ == "__main__":
    main()
