"""Latency of int8 and of float32 on each engine, as we export them and as other tools do; what training for int8 costs.

Rows are ``MODEL/bBATCH/PRECISION/ENGINE`` with the metric ``p50_ms``, all of one model and batch from one interleaved
run; our artefact's engines have their plain names, other tools' own int8 networks theirs (``onnxruntime_static``,
``openvino_nncf``, ``executorch_xnnpack``). A row without a value says what is missing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import Row, finish, options, ratios, training_step
from engine_calls import Make, as_rows, in_turn, no_grad, reason_of
from quantize_networks import NETWORKS, Sizes, make
from quantize_tools import TOOLS, AbsentError, is_fit
from torch import Tensor, nn

import compress
from compress.export import TARGETS, Gates, export_artifact
from compress.quantize import calibrate, convert, prepare
from compress.surgery.capture import export_program

ANY = Gates(max_relative_error=1.0, min_top1_agreement=0.0, min_int8_fraction=0.0)  # weights are random
SMALL = Sizes(image=64, tokens=16, steps=10)
BATCHES = (1, 16)


def main() -> None:
    arguments = options(__doc__ or "", _more)
    warnings.filterwarnings("ignore")
    sizes = SMALL if arguments.quick else Sizes()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for name in arguments.models or list(NETWORKS)[: 1 if arguments.quick else None]:
        rows += latencies(name, sizes, arguments)
        rows += training(name, sizes, arguments)
    if not arguments.no_resume:
        rows += resume(num=1 if arguments.quick else 3)
    finish(arguments, rows)


def latencies(name: str, sizes: Sizes, arguments: argparse.Namespace) -> list[Row]:
    """Return the time of each engine at each batch size."""
    network, inputs = make(name, sizes)
    network.eval()
    data = inputs(32)
    found: dict[str, Make] = {"fp32/eager": lambda batch: no_grad(network)}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, engine in _engines(network, data, Path(folder), arguments):
            if isinstance(engine, str):
                missing[key] = engine
            else:
                found[key] = engine
        rows = []
        for batch in BATCHES:
            rows += _times(f"{name}/b{batch}", inputs(batch), found, missing, seconds=arguments.seconds)
    return rows


def training(name: str, sizes: Sizes, arguments: argparse.Namespace) -> list[Row]:
    """Return time and memory of a training step with fake quantization beside one in float32."""
    network, inputs = make(name, sizes)
    x = inputs(4 if arguments.quick else 16)
    y = torch.zeros(len(x), dtype=torch.int64)
    prepared = prepare(copy.deepcopy(network).train(), (x[:2],), arguments.scheme)
    calls = {
        "fp32 step": training_step(network, x, y, dtype=torch.float32),
        "QAT step": training_step(prepared, x, y, dtype=torch.float32),
    }
    case = f"{name}/b{len(x)}"
    kept = {key: kept_for_backward(step, module) for (key, step), module in zip(calls.items(), (network, prepared))}
    first = kept["fp32 step"]
    memory = [Row(f"{case}: {key}", "kept for the backward pass", value / 2**20, "MiB") for key, value in kept.items()]
    memory.append(Row(f"{case}: QAT step", "kept / fp32 step", kept["QAT step"] / first, "ratio"))
    return ratios(case, calls, seconds=arguments.seconds, min_runs=4) + memory


def kept_for_backward(step: Callable[[], object], network: nn.Module) -> int:
    """Return the bytes that autograd keeps from the forward pass of a step, but for the network's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # all are alive until the backward pass
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(size for place, size in kept.items() if place not in own)


def resume(*, num: int) -> list[Row]:
    """Return what going on with a fit costs, from the start of a process to its first step."""
    times: dict[str, list[float]] = {"fp32": [], "int8": []}
    with tempfile.TemporaryDirectory() as folder:
        for precision in times:
            _resume(precision, "begin", folder)
        for _ in range(num):
            for precision, found in times.items():
                found.append(_resume(precision, "go_on", folder))
    medians = {precision: statistics.median(found) for precision, found in times.items()}
    rows = [
        Row(f"resnet18/resume/{precision}", "time to first step", value, "s") for precision, value in medians.items()
    ]
    return [*rows, Row("resnet18/resume/int8", "more than fp32", medians["int8"] - medians["fp32"], "s")]


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), help="all of them by default")
    parser.add_argument("--scheme", default="int8_portable", help="ours; one artefact for all engines")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of each engine at each batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    parser.add_argument("--engines", nargs="+", default=list(TARGETS), help="of our artefact")
    parser.add_argument("--tools", nargs="*", choices=list(TOOLS), default=list(TOOLS), help="other tools' int8")
    parser.add_argument("--no-resume", action="store_true", help="leave the resume of a fit out")


def _engines(
    network: nn.Module, data: Tensor, folder: Path, arguments: argparse.Namespace
) -> Iterator[tuple[str, Make | str]]:
    """Yield each precision and engine with what makes its calls, or with the reason why there are none."""
    floats = export_program(network, (data[:2],))
    for engine in (name for name in ("aoti", "onnxruntime", "openvino") if name in arguments.engines):
        yield f"fp32/{engine}", _ours(floats, engine, network, data, folder / "fp32", arguments)
    prepared = prepare(copy.deepcopy(network), (data[:2],), arguments.scheme)
    calibrate(prepared, [(data,)], progress=True)
    integers = export_program(convert(prepared.eval()), (data[:2],))
    for engine in arguments.engines:
        yield f"int8/{engine}", _ours(integers, engine, prepared, data, folder / "int8", arguments)
    (folder / "tools").mkdir()
    for tool in (name for name in arguments.tools if is_fit(name, network)):
        try:
            yield f"int8/{tool}", TOOLS[tool](network, data, folder / "tools", num_threads=arguments.threads)
        except AbsentError as error:
            yield f"int8/{tool}", str(error)
        except Exception as error:  # whatever a tool says to a network that it does not take
            yield f"int8/{tool}", reason_of(error)


def _ours(
    program: torch.export.ExportedProgram,
    engine: str,
    reference: nn.Module,
    data: Tensor,
    folder: Path,
    arguments: argparse.Namespace,
) -> Make | str:
    """Export for one engine, so that one that fails leaves the others alone, and load it."""
    if engine not in TARGETS:
        return f"{engine} is no target of this version"
    path = folder / engine
    scheme = arguments.scheme if folder.name == "int8" else None
    try:
        export_artifact(
            program, path, targets=[engine], reference=reference, held_out=(data,), scheme=scheme, gates=ANY
        )
        model = compress.load(path, engine=engine, num_threads=arguments.threads)
    except Exception as error:  # an engine that is not installed, or does not take the network
        return reason_of(error)
    if engine in ("eager", "aoti"):
        return lambda batch: model
    return lambda batch: lambda x: model(x.numpy())


def _times(case: str, x: Tensor, found: dict[str, Make], missing: dict[str, str], *, seconds: float) -> list[Row]:
    medians, reasons = in_turn(x, found, missing, seconds=seconds)
    first = next(iter(medians.values()))
    gains = [Row(f"{case}/{key}", "faster than eager fp32", first / value, "times") for key, value in medians.items()]
    return as_rows(case, medians, reasons) + gains


def _resume(precision: str, what: str, folder: str) -> float:
    command = [sys.executable, str(Path(__file__).with_name("quantize_resume.py")), precision, what, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    times = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("seconds ")]
    if done.returncode or not times:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(times[0])


if __name__ == "__main__":
    main()
