"""An artefact's engines on a GPU beside eager and torch.compile, ResNet-50 and BERT-base with random weights.

Rows are ``MODEL/bBATCH/PRECISION/ENGINE`` with the metric ``p50_ms``, all of one model, precision and batch from one
interleaved run; a call waits for the GPU. Inputs lie on the GPU: float32 for ours, which casts them, in the network's
own precision for the others. ``compiled`` is ``torch.compile(mode="max-autotune")`` for that batch alone. Further rows
compare ours with the faster of the two. ``onnxruntime_cuda`` needs onnxruntime-gpu.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Row, finish, options
from torch import Tensor, nn

import compress
from compress.export import Gates, export_artifact
from compress.measure.latency import measure_latency
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
    data, dtype = inputs(4), PRECISIONS[precision]
    targets = [f"cuda_{precision}", f"aoti_cuda_{precision}", *(["onnxruntime"] if arguments.onnxruntime else [])]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "artifact", time.perf_counter()
        manifest = export_artifact(
            export_program(network, [value[:2] for value in data]),
            path, targets=targets, reference=network, held_out=data, gates=ANY,
        )  # fmt: skip
        rows.append(Row(f"{name}/{precision}", "export and check", time.perf_counter() - start, "s"))
        rows += [
            Row(f"{name}/{precision}/{skipped}", "p50_ms", None, "ms", why) for skipped, why in manifest.skipped.items()
        ]
        start = time.perf_counter()
        model = compress.load(path, "cuda")
        ours = {engine: compress.load(path, engine=engine) for engine in model.engines}
        rows.append(Row(f"{name}/{precision}", "load", time.perf_counter() - start, "s"))
        half = copy.deepcopy(network).cuda().to(dtype)
        if name == "resnet50":
            half = half.to(memory_format=torch.channels_last)
        for batch in arguments.batches:
            rows += _at(f"{name}/b{batch}/{precision}", half, inputs(batch), ours, arguments)
    return rows


def _at(
    case: str, half: nn.Module, data: list[Tensor], ours: dict[str, Any], arguments: argparse.Namespace
) -> list[Row]:
    whole = [value.cuda() for value in data]
    dtype = next(half.parameters()).dtype
    own = [value.to(dtype) if value.is_floating_point() else value for value in whole]
    own = [value.to(memory_format=torch.channels_last) if value.dim() == 4 else value for value in own]
    calls: dict[str, Callable[[], object]] = {"eager": _waiting(half, own)}
    rows = []
    if arguments.compiled:
        start = time.perf_counter()
        torch._dynamo.reset()
        compiled = torch.compile(half, mode="max-autotune", dynamic=False)
        calls["compiled"] = _waiting(compiled, own)
        for _ in range(3):
            calls["compiled"]()
        rows.append(Row(f"{case}/compiled", "compile", time.perf_counter() - start, "s"))
    calls |= {engine: _waiting(model, whole) for engine, model in ours.items()}
    measured = measure_latency(calls, seconds=arguments.seconds, warmup=5)
    rows += [Row(f"{case}/{engine}", "p50_ms", latency.p50_ms, "ms") for engine, latency in measured.items()]
    best = min((engine for engine in calls if engine not in ours), key=lambda engine: measured[engine].p50_ms)
    fastest = min(measured[engine].p50_ms for engine in ours)
    rows.append(Row(case, "ours / best of the others", fastest / measured[best].p50_ms, "ratio", best))
    for row in rows:
        print(row, flush=True)
    return rows


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
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each call at each batch size")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    parser.add_argument("--onnxruntime", action="store_true", help="build an ONNX file, too")


if __name__ == "__main__":
    main()
