"""What integers in attention's two products bring: ``int8_attention`` beside ``int8_portable``, interleaved, batch 1.

Rows are ``bert6: TOKENS tokens, ENGINE, SCHEME`` with the median, and its ratio to ``int8_portable`` in that engine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import Row, finish, options, ratios
from quantize_networks import Sizes, make

import compress
from compress.export import Gates, export_artifact
from compress.quantize import calibrate, convert, prepare
from compress.surgery.capture import export_program

_SCHEMES = ("int8_portable", "int8_attention")
_ANY = Gates(max_relative_error=1.0, min_top1_agreement=0.0, min_int8_fraction=0.0)  # weights are random


def main() -> None:
    arguments = options(__doc__ or "", _more)
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for tokens in [16] if arguments.quick else arguments.tokens:
        network, inputs = make("bert6", Sizes(tokens=tokens))
        x = inputs(4)
        with tempfile.TemporaryDirectory() as folder:
            for scheme in _SCHEMES:
                prepared = prepare(network.eval(), (x[:2],), scheme)
                calibrate(prepared, [(x,)], ranges="minmax")
                export_artifact(
                    export_program(convert(prepared.eval()), (x[:2],)),
                    Path(folder) / scheme,
                    targets=arguments.engines,
                    reference=prepared,
                    held_out=(x,),
                    scheme=scheme,
                    gates=_ANY,
                )
            for engine in arguments.engines:
                rows += _compare(Path(folder), engine, x[:1], arguments)
    finish(arguments, rows)


def _compare(folder: Path, engine: str, x: torch.Tensor, arguments: argparse.Namespace) -> list[Row]:
    models = {
        scheme: compress.load(folder / scheme, engine=engine, num_threads=arguments.threads) for scheme in _SCHEMES
    }
    calls = {scheme: lambda model=model: model(x) for scheme, model in models.items()}
    return ratios(f"bert6: {x.shape[1]} tokens, {engine}", calls, seconds=arguments.seconds)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512], help="lengths of texts")
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino", "aoti"], help="which engines")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of each")
    parser.add_argument("--threads", type=int, default=1, help="of every engine")


if __name__ == "__main__":
    main()
