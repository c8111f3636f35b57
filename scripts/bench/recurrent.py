"""Recurrent classifiers in ONNX Runtime, int8 as we export it beside float32: processor time of one thread, in turn.

Two layers over 64 features and 100 steps, random weights. GRUs are measured below the number of units from which they
are quantised, too: that is how the number was found.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import Row, finish, options
from torch import Tensor, nn

import compress
from compress.export import Gates, export_artifact
from compress.quantize import calibrate, convert, coverage, prepare
from compress.quantize.graph import annotate
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length

LENGTHS = [Length(1, 2)]  # with a fixed number of steps, torch writes out every one of them to trace the network
ANY = Gates(max_relative_error=1.0, min_top1_agreement=0.0, min_int8_fraction=0.0)  # weights are random


class Classifier(nn.Module):
    """Two recurrent layers and a linear one."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], hidden: int) -> None:
        super().__init__()
        self.layers = kind(64, hidden, 2, batch_first=True)
        self.fc = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map series (N, L, 64) to logits (N, 10)."""
        return self.fc(self.layers(x)[0][:, -1])


def main() -> None:
    arguments = options(__doc__.splitlines()[0], _more)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    annotate.FEWEST_UNITS = 1
    rows: list[Row] = []
    for name in arguments.kinds:
        for hidden in arguments.hidden:
            rows += compare(f"{name}/{hidden}", Classifier(getattr(nn, name), hidden).eval(), arguments)
    finish(arguments, rows)


def compare(case: str, network: nn.Module, arguments: argparse.Namespace) -> list[Row]:
    """Return the time of both precisions at each batch size, and how far int8 is from what was trained."""
    x = torch.randn(16, 12 if arguments.quick else 100, 64)
    prepared = prepare(network, (x[:2],), "int8", lengths=LENGTHS)
    calibrate(prepared, [(x,)])
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for precision, made, reference in (("fp32", network, network), ("int8", convert(prepared.eval()), prepared)):
            manifest = export_artifact(
                export_program(made, (x[:2],), lengths=LENGTHS),
                Path(folder) / precision,
                targets=["onnxruntime"],
                reference=reference,
                held_out=(x,),
                scheme="int8" if precision == "int8" else None,
                gates=ANY,
            )
            models[precision] = compress.load(Path(folder) / precision, engine="onnxruntime", num_threads=1)
        target = manifest.targets["onnxruntime"]
        rows = [
            Row(case, "MACs in int8", 100 * coverage(prepared, [x]).share, "%"),
            Row(case, "kernels in float32", target.census["float_kernels"], ""),
            Row(case, "relative error", target.agreement["relative_error"], ""),
        ]
        for batch, runs in zip((1, 4, 16), arguments.runs):
            times = in_turn(models, x[:batch].numpy(), runs)
            rows += [Row(f"{case}/b{batch}/{key}", "median", 1e3 * value, "ms") for key, value in times.items()]
            rows.append(Row(f"{case}/b{batch}", "faster than fp32", times["fp32"] / times["int8"], "times"))
    return rows


def in_turn(models: Mapping[str, Callable[[Any], object]], x: Any, runs: int) -> dict[str, float]:
    """Return medians in seconds of processor time: what else the machine does is not in them."""
    times: dict[str, list[float]] = {key: [] for key in models}
    for model in models.values():
        model(x)
    for _ in range(runs):
        for key, model in models.items():
            start = time.process_time()
            model(x)
            times[key].append(time.process_time() - start)
    return {key: statistics.median(found) for key, found in times.items()}


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", nargs="+", default=["GRU", "LSTM"], choices=["GRU", "LSTM"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--runs", nargs=3, type=int, default=[60, 40, 20], help="at batches of 1, 4 and 16")


if __name__ == "__main__":
    main()
