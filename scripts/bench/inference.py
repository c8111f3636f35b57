"""Latency of an int8 artefact's engines against the same network in eager fp32, weights random: only time counts."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from common import Row, finish, options, ratios

import compress
from compress.export import TARGETS, Gates, export_artifact
from compress.models import ResNet
from compress.quantize import convert, prepare
from compress.surgery.capture import export_program

CASES = {
    "ResNet 16, 28×28": (ResNet(in_channels=1, width=16, blocks=(1, 1, 1)), (1, 28, 28)),
    "ResNet 64, 64×64": (ResNet(in_channels=3, width=64, blocks=(2, 2, 2, 2)), (3, 64, 64)),
}


def main() -> None:
    arguments = options(__doc__ or "")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for case, (network, shape) in list(CASES.items())[: 1 if arguments.quick else None]:
            inputs = torch.randn(32, *shape)
            prepared = prepare(copy.deepcopy(network).train(), (inputs[:2],), "int8").train()
            prepared(inputs)
            path = Path(folder) / case
            export_artifact(
                export_program(convert(prepared.eval()), (inputs[:2],)),
                path,
                targets=list(TARGETS),
                reference=prepared,
                held_out=(inputs,),
                scheme="int8",
                gates=Gates(max_relative_error=1.0, min_top1_agreement=0.0),
            )
            network.eval()
            for batch in (1, 32):
                x = inputs[:batch]
                calls = {"eager fp32": lambda x=x, network=network: _no_grad(network, x)}
                for engine in TARGETS:
                    model = compress.load(path, engine=engine)
                    given = x.numpy() if engine == "onnxruntime" else x
                    calls[f"{engine} int8"] = lambda model=model, given=given: model(given)
                rows += ratios(f"{case}, batch {batch}", calls, seconds=1.0 if arguments.quick else 4.0)
    finish(arguments, rows)


def _no_grad(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(x)


if __name__ == "__main__":
    main()
