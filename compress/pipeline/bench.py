"""Measure every stage: cost by counting, latency in one interleaved run, memory in a fresh process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from compress.distill import FileTeacher, read_batch
from compress.measure.cost import macs, num_bytes, num_params
from compress.measure.latency import measure_latency
from compress.measure.memory import peak_memory, peak_memory_of
from compress.pipeline.rundir import RunDirectory
from compress.quantize import rounded_layers
from compress.runtime import CompactModel, load
from compress.runtime.engines import READS
from compress.surgery import Captured

__all__ = ["BATCH_SIZES", "bench"]

BATCH_SIZES = (1, 32)


def bench(run: RunDirectory, *, seconds: float = 1.0) -> None:
    """Measure the stages and the artefact on this machine.

    Args:
        run: After ``export``.
        seconds: Time given to each network at each batch size.

    Leaves ``bench.json``: ``{stage: {num_params, macs, bytes, peak_memory, latency}}``, the artefact's with its
    metrics on the test split and with ``artifact_bytes``.
    """
    run.console.rule(Text("bench", "bold"))
    networks = {stage: (run.final if stage == "final" else run.network(stage))[0] for stage in run.stages()}
    served = load(run.artifact)
    engines = {name: load(run.artifact, engine=name) for name in served.engines}
    sample = _first(run, 1)
    results: dict[str, dict[str, Any]] = {}
    for stage, network in networks.items():
        results[stage] = {
            **_cost(network, sample),
            "peak_memory": None if _is_quantized(network) else peak_memory_of(network, sample),
            "latency": [],
        }
    serving = {served.engine_for(batch) for batch in BATCH_SIZES}
    results["artifact"] = {
        **results["final"],
        "bytes": sum(served.manifest.targets[name].bytes for name in {READS.get(name, name) for name in serving}),
        "artifact_bytes": sum(path.stat().st_size for path in run.artifact.iterdir()),
        "peak_memory": peak_memory("compress.runtime.loading:load_and_call", str(run.artifact), served.engine),
        "engine": served.engine,
        "metrics": _test_served(run, served),
        "latency": [],
    }
    plain = {stage: network for stage, network in networks.items() if not _is_quantized(network)}
    for batch in BATCH_SIZES:
        for row in _latencies(plain, engines, _first(run, batch), seconds):
            stage = row.pop("stage")
            results[stage]["latency"].append({"batch": batch, **row})
    results["artifact"]["latency"] = _serving_first(results["artifact"]["latency"], served.engine_for)
    run.write_json("bench", results)


def _serving_first(rows: list[dict[str, Any]], serves: Callable[[int], str]) -> list[dict[str, Any]]:
    """Return rows in such an order that, of each batch size, what serves it comes first."""
    return sorted(rows, key=lambda row: (row["engine"] != serves(row["batch"]), row["batch"]))


def _is_quantized(network: nn.Module) -> bool:
    """Say whether a network simulates integers, which nobody serves."""
    return isinstance(network, Captured) or bool(rounded_layers(network))


def _first(run: RunDirectory, num: int) -> tuple[Tensor, ...]:
    return tuple(tensor[:num] for tensor in run.held_out)


def _cost(network: nn.Module, sample: Sequence[Tensor]) -> dict[str, int | None]:
    files = [module for module in network.modules() if isinstance(module, FileTeacher)]
    if files:  # what is in them, nobody can count
        return {"num_params": None, "macs": None, "bytes": sum(file.num_bytes for file in files)}
    return {"num_params": num_params(network), "macs": macs(network, sample), "bytes": num_bytes(network)}


def _latencies(
    networks: dict[str, nn.Module], engines: dict[str, CompactModel], inputs: Sequence[Tensor], seconds: float
) -> list[dict[str, Any]]:
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for stage, network in networks.items():
        calls[stage, getattr(network, "engine", "eager")] = _eager(network, inputs)
    arrays = [tensor.numpy() for tensor in inputs]
    for name, model in engines.items():
        calls["artifact", name] = _engine(model, inputs if name != "onnxruntime" else arrays)
    measured = measure_latency({"/".join(key): call for key, call in calls.items()}, seconds=seconds, progress=True)
    return [
        {
            "stage": stage,
            "engine": engine,
            "threads": engines[engine].threads if stage == "artifact" else torch.get_num_threads(),
            "p50_ms": measured[f"{stage}/{engine}"].p50_ms,
            "p95_ms": measured[f"{stage}/{engine}"].p95_ms,
        }
        for stage, engine in calls
    ]


def _eager(network: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return network(*inputs)

    return call


def _engine(model: CompactModel, inputs: Sequence[Any]) -> Callable[[], object]:
    return lambda: model(*inputs)


def _test_served(run: RunDirectory, model: CompactModel) -> dict[str, float]:
    data = run.recipe.data
    data.setup("test")
    metrics = run.recipe.task.metrics("")
    for batch in data.test_dataloader():
        given = read_batch(batch)
        metrics.update(model(*given.inputs), given.targets)
    return {name: float(value) for name, value in metrics.compute().items()}
