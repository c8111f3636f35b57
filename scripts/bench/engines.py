"""An artefact that chooses its engine, beside each of its engines and beside every engine by its own tools.

Rows are ``MODEL/bBATCH/PRECISION/ENGINE`` with the metric ``p50_ms``, all of one model, precision and batch from one
interleaved run. ``auto`` is ``compress.load`` of one artefact with all targets; plain names are engines of the same
artefact; ``eager`` in fp32 is the module itself; engines by their own tools are ``aoti_own`` and so on in fp32,
``onnxruntime_static``, ``openvino_nncf`` and so on in int8. A row without a value says what is missing. Further
rows compare auto with the fastest of all, and each engine of the artefact with the same engine by its own tools.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import Row, finish, options
from engine_calls import Make, as_rows, in_turn, no_grad, reason_of
from float_tools import FLOAT_TOOLS
from halving import halved
from quantize_networks import NETWORKS, Sizes, make
from quantize_tools import TOOLS, AbsentError, is_fit
from torch import Tensor, nn

import compress
from compress.export import TARGETS, Gates, export_artifact
from compress.measure.latency import measure_latency
from compress.quantize import calibrate, convert, prepare
from compress.runtime import CompactModel
from compress.runtime.engines import device_of, make_engine, missing_package
from compress.surgery.capture import export_program

ANY = Gates(max_relative_error=10.0, min_top1_agreement=0.0, min_int8_fraction=0.0)  # weights are random
SMALL = Sizes(image=64, tokens=16, steps=10)
MODELS = [*NETWORKS, "resnet18_pruned"]
BATCHES = (1, 16)
# Engine of the artefact: the same by its own tools, in fp32 and in int8.
OWN = {
    "aoti": ["aoti_own"],
    "onnxruntime": ["onnxruntime_own", "onnxruntime_static", "onnxruntime_dynamic"],
    "openvino": ["openvino_own", "openvino_nncf"],
    "executorch": ["executorch_own", "executorch_xnnpack"],
}


def main() -> None:
    arguments = options(__doc__ or "", _more)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    # Choices of an engine that were made under other circumstances do not count here.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["COMPRESS_CACHE"] = cache
        rows = overhead(arguments)
        for name in arguments.models or (["lstm"] if arguments.quick else MODELS):
            for precision in ("fp32", "int8"):
                rows += compared(name, precision, arguments)
    finish(arguments, rows)
    if arguments.plot:
        draw(rows, arguments.plot)


def compared(name: str, precision: str, arguments: argparse.Namespace) -> list[Row]:
    """Return the rows of one network in one precision."""
    network, inputs = _network(name, SMALL if arguments.quick else Sizes())
    data, case = inputs(32), f"{name}/b{{batch}}/{precision}"
    with tempfile.TemporaryDirectory() as folder:
        found, missing = _by_own_tools(network, data, Path(folder), precision, arguments)
        path = Path(folder) / "artifact"
        missing |= _export(network, data, path, precision, arguments)
        auto = compress.load(path, num_threads=arguments.threads)
        start = time.perf_counter()
        compress.load(path, num_threads=arguments.threads)
        rows = [Row(f"{name}/{precision}", "load, second time", time.perf_counter() - start, "s")]
        for engine in auto.engines:
            found[engine] = _served(compress.load(path, engine=engine, num_threads=arguments.threads))
        found["auto"] = _served(auto)
        for batch in BATCHES:
            medians, reasons = in_turn(inputs(batch), found, missing, seconds=arguments.seconds)
            rows += as_rows(case.format(batch=batch), medians, reasons)
            rows += _compared(case.format(batch=batch), medians, auto.engine_for(batch))
    return rows


def overhead(arguments: argparse.Namespace) -> list[Row]:
    """Return what our call adds to the engine's own, for a network that takes no time."""
    network, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(4, 8)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        engines = [name for name in ("onnxruntime", "aoti") if name in arguments.engines]
        for engine in engines:
            path = Path(folder) / engine
            program = export_program(network, (x,))
            manifest = export_artifact(program, path, targets=[engine], reference=network, held_out=(x,), gates=ANY)
            model = compress.load(path, engine=engine, num_threads=1)
            own = make_engine(engine, path / manifest.targets[engine].file, num_threads=1)
            given: Any = x[:1].numpy() if own.takes == "numpy" else x[:1]
            calls: Mapping[str, Callable[[], object]] = {
                "own": lambda own=own, given=given: own([given]),
                "ours": lambda model=model, given=given: model(given),
            }
            measured = measure_latency(calls, seconds=arguments.seconds)
            extra = 1e3 * (measured["ours"].p50_ms - measured["own"].p50_ms)
            rows.append(Row(f"overhead/b1/fp32/{engine}", "our call - the engine's", extra, "us"))
    torch.set_num_threads(arguments.threads)
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Draw the times of each model and batch, relative to the fastest that is not ours."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric == "p50_ms" and row.value is not None:
            case, _, engine = row.name.rpartition("/")
            times.setdefault(case, {})[engine] = row.value
    engines = list(dict.fromkeys(engine for each in times.values() for engine in each))
    figure, axis = plt.subplots(figsize=(10, 0.45 * len(times) + 1.5))
    colours = plt.get_cmap("tab20")
    for index, engine in enumerate(engines):
        cases = [case for case in times if engine in times[case]]
        relative = [times[case][engine] / min(times[case].values()) for case in cases]
        places = [list(times).index(case) for case in cases]
        own = engine == "auto"
        style: dict[str, Any] = {"marker": "*", "s": 160, "zorder": 3} if own else {"marker": "o", "s": 30}
        axis.scatter(relative, places, color="black" if own else colours(index % 20), label=engine, **style)
    axis.set_yticks(range(len(times)), list(times))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("p50 latency / that of the fastest in the row")
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, help="all of them by default")
    parser.add_argument("--scheme", default="int8_portable", help="ours; one artefact for all engines")
    parser.add_argument("--seconds", type=float, default=4.0, help="time of each call at each batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    here = [name for name in TARGETS if missing_package(name) is None and device_of(name) == "cpu"]
    parser.add_argument("--engines", nargs="+", choices=list(TARGETS), default=here, help="of our artefact")
    parser.add_argument("--plot", type=Path, help="also draw the times there")


def _network(name: str, sizes: Sizes) -> tuple[nn.Module, Callable[[int], Tensor]]:
    network, inputs = make(name.removesuffix("_pruned"), sizes)
    network.eval()
    return (halved(network, (inputs(2),)) if name.endswith("_pruned") else network).eval(), inputs


def _by_own_tools(
    network: nn.Module, data: Tensor, folder: Path, precision: str, arguments: argparse.Namespace
) -> tuple[dict[str, Make], dict[str, str]]:
    """Return the network by each engine's own tools; eager only where it is of this precision."""
    found: dict[str, Make] = {"eager_own": lambda batch: no_grad(network)} if precision == "fp32" else {}
    missing: dict[str, str] = {}
    tools = FLOAT_TOOLS if precision == "fp32" else TOOLS
    for tool, prepared in ((name, tool) for name, tool in tools.items() if is_fit(name, network)):
        try:
            found[tool] = prepared(network, data, folder, num_threads=arguments.threads)
        except AbsentError as error:
            missing[tool] = str(error)
        except Exception as error:  # whatever a tool says to a network that it does not take
            missing[tool] = reason_of(error)
    return found, missing


def _export(
    network: nn.Module, data: Tensor, path: Path, precision: str, arguments: argparse.Namespace
) -> dict[str, str]:
    """Export for all engines that take it; return why the others do not."""
    reference, scheme = network, None
    if precision == "int8":
        scheme = arguments.scheme
        reference = prepare(copy.deepcopy(network), (data[:2],), scheme)
        calibrate(reference, [(data,)], progress=True)
    program = export_program(convert(reference.eval()) if scheme else network, (data[:2],))
    manifest = export_artifact(
        program,
        path,
        targets=list(arguments.engines),
        reference=reference,
        held_out=(data,),
        scheme=scheme,
        gates=ANY,
    )
    return {name: reason[:160] for name, reason in manifest.skipped.items()}


def _served(model: CompactModel) -> Make:
    return lambda batch: lambda x: model(x.numpy())


def _compared(case: str, medians: Mapping[str, float], serving: str) -> list[Row]:
    others = {name: value for name, value in medians.items() if name != "auto"}
    fastest = min(others, key=others.__getitem__)
    rows = [Row(f"{case}/auto", "time / fastest", medians["auto"] / others[fastest], "ratio", f"{serving} / {fastest}")]
    for engine, tools in OWN.items():
        for tool in tools:
            if engine in medians and tool in medians:
                rows.append(Row(f"{case}/{engine}", f"time / {tool}", medians[engine] / medians[tool], "ratio"))
    return rows


if __name__ == "__main__":
    main()
