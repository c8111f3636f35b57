"""What TVM gains by tuning: files of more and more trials beside ONNX Runtime, batch 1, floats, one interleaved run.

Rows are ``NETWORK/b1/fp32/tvm_TRIALS`` with ``p50_ms``, and ``build_s`` for the time that building took.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch
from common import Row, finish, options
from engine_calls import Make, as_rows, in_turn
from quantize_networks import NETWORKS, Sizes, make

from compress.export.targets import TARGETS
from compress.runtime.engines import Engine, make_engine
from compress.surgery.capture import export_program


def main() -> None:
    arguments = options(__doc__ or "", _more)
    torch.set_num_threads(arguments.threads)
    sizes = Sizes(image=32 if arguments.quick else arguments.image)
    rows: list[Row] = []
    for name in arguments.models:
        network, inputs = make(name, sizes)
        network.eval()
        program, case = export_program(network, (inputs(2),)), f"{name}/b1/fp32"
        found: dict[str, Make] = {}
        with tempfile.TemporaryDirectory() as folder:
            for trials in arguments.trials:
                begun = time.perf_counter()
                engine = _build("tvm", program, Path(folder) / str(trials), arguments.threads, trials=trials)
                rows.append(Row(f"{case}/tvm_{trials}", "build_s", time.perf_counter() - begun, "s"))
                found[f"tvm_{trials}"] = _calls(engine)
            found["onnxruntime"] = _calls(_build("onnxruntime", program, Path(folder) / "onnx", arguments.threads))
            rows += as_rows(case, *in_turn(inputs(1), found, {}, seconds=arguments.seconds))
    finish(arguments, rows)


def _build(name: str, program: torch.export.ExportedProgram, folder: Path, threads: int, **told: int) -> Engine:
    target = import_module(TARGETS[name])
    folder.mkdir()
    target.build(program, folder / target.FILE, **told)
    return make_engine(name, folder / target.FILE, num_threads=threads)


def _calls(engine: Engine) -> Make:
    return lambda batch: lambda x: engine([x if engine.takes == "torch" else x.numpy()])


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=["resnet18"], help="which networks")
    parser.add_argument("--trials", nargs="+", type=int, default=[0, 32, 128], help="schedules measured while building")
    parser.add_argument("--image", type=int, default=224, help="height and width of images")
    parser.add_argument("--seconds", type=float, default=10.0, help="time of each file")
    parser.add_argument("--threads", type=int, default=1, help="of every engine")


if __name__ == "__main__":
    main()
