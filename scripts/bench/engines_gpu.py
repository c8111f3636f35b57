"""An artefact's engines on a GPU beside eager, torch.compile and ONNX Runtime; ResNet-50 and BERT-base, random weights.

Rows are ``MODEL/bBATCH/PRECISION/ENGINE`` with the metric ``p50_ms``, all of one model, precision and batch from one
interleaved run; a call waits for the GPU. Inputs lie on the GPU: float32 for ours, which casts them, in the network's
own precision for the others. ``compiled`` is ``torch.compile`` for that batch alone, ``onnxruntime_cuda`` our ONNX file
in that precision with inputs and outputs bound on the GPU (float16 alone; needs onnxruntime-gpu). Further rows compare
ours with the fastest of the others. ``--prepare artifacts compiled`` builds and compiles ahead, without timing.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Row, finish, options
from torch import Tensor, nn

import compress
from compress.export import Gates, export_artifact
from compress.export.passes import clean_up
from compress.export.precision import in_precision
from compress.export.targets import onnxruntime
from compress.measure.latency import measure_latency
from compress.runtime.manifest import read_manifest
from compress.runtime.requirements import why_not
from compress.surgery.capture import export_program

ANY = Gates(max_relative_error=10.0, min_top1_agreement=0.0, min_int8_fraction=0.0)  # weights are random
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    arguments = options(__doc__ or "", _more)
    if not torch.cuda.is_available():
        raise SystemExit("engines_gpu: expected a GPU that CUDA sees, got none. Run it on a machine with one.")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    rows: list[Row] = []
    for name in arguments.models:
        for precision in arguments.precisions:
            rows += compared(name, precision, arguments)
    finish(arguments, rows)


def compared(name: str, precision: str, arguments: argparse.Namespace) -> list[Row]:
    """Return the rows of one network in one precision."""
    network, inputs = NETWORKS[name]()
    rows: list[Row] = []
    path = arguments.artifacts / f"{name}_{precision}"
    if not path.exists() and arguments.prepare != ["compiled"]:
        rows += _built(network, inputs(4), path, name, precision)
    half = copy.deepcopy(network).cuda().to(PRECISIONS[precision])
    if name == "resnet50":
        half = half.to(memory_format=torch.channels_last)
    if arguments.prepare:
        for batch in arguments.batches if "compiled" in arguments.prepare else []:
            _compiled(half, _own(half, inputs(batch)), arguments.mode)
        return rows
    start = time.perf_counter()
    model = compress.load(path, "cuda")
    ours = {engine: compress.load(path, engine=engine) for engine in model.engines if engine != "eager_cuda"}
    rows.append(Row(f"{name}/{precision}", "load", time.perf_counter() - start, "s"))
    there = read_manifest(path)
    for engine in (f"cuda_{precision}", f"inductor_cuda_{precision}"):
        if engine not in ours:
            target = there.targets.get(engine)
            reason = there.skipped.get(engine) if target is None else why_not(target.requires)
            rows.append(Row(f"{name}/{precision}/{engine}", "p50_ms", None, "ms", reason or "does not load"))
    for batch in arguments.batches:
        rows += _at(f"{name}/b{batch}/{precision}", half, inputs(batch), ours, path.with_suffix(".onnx"), arguments)
    return rows


def _built(network: nn.Module, data: list[Tensor], path: Path, name: str, precision: str) -> list[Row]:
    program = export_program(network, [value[:2] for value in data])
    targets, start = [f"cuda_{precision}", f"inductor_cuda_{precision}"], time.perf_counter()
    export_artifact(program, path, targets=targets, reference=network, held_out=data, gates=ANY)
    rows = [Row(f"{name}/{precision}", "export and check", time.perf_counter() - start, "s")]
    if precision == "fp16":
        onnxruntime.build(in_precision(clean_up(program)[0], torch.float16), path.with_suffix(".onnx"))
    return rows


def _at(
    case: str, half: nn.Module, data: list[Tensor], ours: dict[str, Any], file: Path, arguments: argparse.Namespace
) -> list[Row]:
    whole = [value.cuda() for value in data]
    own = _own(half, data)
    calls: dict[str, Callable[[], object]] = {"eager": _waiting(half, own)}
    rows = []
    if arguments.compiled:
        start = time.perf_counter()
        calls["compiled"] = _compiled(half, own, arguments.mode)
        rows.append(Row(f"{case}/compiled", "compile", time.perf_counter() - start, "s", arguments.mode))
    if arguments.onnxruntime and file.exists():
        calls["onnxruntime_cuda"] = _bound(file, whole)
    calls |= {engine: _waiting(model, whole) for engine, model in ours.items()}
    measured = measure_latency(calls, seconds=arguments.seconds, warmup=5)
    rows += [Row(f"{case}/{engine}", "p50_ms", latency.p50_ms, "ms") for engine, latency in measured.items()]
    best = min((engine for engine in calls if engine not in ours), key=lambda engine: measured[engine].p50_ms)
    fastest = min(measured[engine].p50_ms for engine in ours)
    rows.append(Row(case, "ours / best of the others", fastest / measured[best].p50_ms, "ratio", best))
    for row in rows:
        print(row, flush=True)
    return rows


def _own(half: nn.Module, data: list[Tensor]) -> list[Tensor]:
    dtype = next(half.parameters()).dtype
    own = [value.cuda().to(dtype) if value.is_floating_point() else value.cuda() for value in data]
    return [value.to(memory_format=torch.channels_last) if value.dim() == 4 else value for value in own]


def _compiled(half: nn.Module, own: list[Tensor], mode: str) -> Callable[[], object]:
    torch._dynamo.reset()
    call = _waiting(torch.compile(half, mode=mode, dynamic=False), own)
    for _ in range(3):
        call()
    return call


def _bound(file: Path, whole: list[Tensor]) -> Callable[[], object]:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CUDAExecutionProvider"])
    binding = session.io_binding()
    kinds = {torch.float32: np.float32, torch.int64: np.int64}
    for given, value in zip(session.get_inputs(), whole):
        binding.bind_input(given.name, "cuda", 0, kinds[value.dtype], list(value.shape), value.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, "cuda")

    def call() -> None:
        session.run_with_iobinding(binding)  # returns when the GPU is done

    return call


def _waiting(network: Callable[..., object], given: list[Tensor]) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            network(*given)
        torch.cuda.synchronize()

    return call


def _resnet50() -> tuple[nn.Module, Callable[[int], list[Tensor]]]:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return resnet50().eval(), lambda batch: [torch.randn(batch, 3, 224, 224)]


def _bert_base() -> tuple[nn.Module, Callable[[int], list[Tensor]]]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    network = _Logits(BertForSequenceClassification(BertConfig(attn_implementation="sdpa"))).eval()

    def inputs(batch: int) -> list[Tensor]:
        mask = torch.ones(batch, 128, dtype=torch.int64)
        mask[1::2, 100:] = 0
        return [torch.randint(1000, 30000, (batch, 128)), mask]

    return network, inputs


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.network(input_ids=tokens, attention_mask=mask).logits


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Callable[[int], list[Tensor]]]]] = {
    "resnet50": _resnet50,
    "bert_base": _bert_base,
}


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["bf16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument(
        "--artifacts", type=Path, default=Path("artifacts_gpu"), help="kept there, and taken from there"
    )
    parser.add_argument(
        "--prepare", nargs="+", choices=["artifacts", "compiled"], help="build or compile, time nothing"
    )
    parser.add_argument("--mode", default="max-autotune", help="of torch.compile")
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each call at each batch size")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    parser.add_argument("--onnxruntime", action="store_true", help="compare with ONNX Runtime, too")


if __name__ == "__main__":
    main()
