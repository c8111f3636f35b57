"""Does a file compiled for one batch size beat the one that takes any? Interleaved, one thread, floats.

For each engine and batch size of small networks: the file with a dynamic batch dimension beside one that was captured
at exactly this size, which is what padding to a bucket would run.
"""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path

import torch
from common import Row, finish, options, ratios
from torch import nn

from compress.export.targets import TARGETS
from compress.models import LSTMClassifier, ResNet
from compress.runtime.engines import Engine, make_engine, missing_package
from compress.surgery.capture import export_program

_NETWORKS = {
    "resnet": (lambda: ResNet(in_channels=3, width=16, blocks=(1, 1, 1)), (3, 32, 32)),
    "transformer": (lambda: _Transformer(), (32, 64)),
    "lstm": (lambda: LSTMClassifier(16, 10, hidden=64, num_layers=1), (30, 16)),
}
_ENGINES = ("aoti", "onnxruntime", "openvino")


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean(1))


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # its fused layer is an operator of eager torch alone
    names = list(_NETWORKS)[: 1 if arguments.quick else None]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            make, shape = _NETWORKS[name]
            network = make().eval()
            for engine in (engine for engine in _ENGINES if missing_package(engine) is None):
                dynamic = _build(engine, export_program(network, (torch.randn(2, *shape),)), Path(folder) / "dynamic")
                for batch in (1, 8, 32):
                    x = torch.randn(batch, *shape)
                    with torch.no_grad():
                        program = torch.export.export(network, (x,), strict=True)
                    fixed = _build(engine, program, Path(folder) / f"fixed{batch}")
                    rows += _compare(f"{name}/b{batch}/{engine}", dynamic, fixed, x, 0.3 if arguments.quick else 1.5)
    finish(arguments, rows)


def _build(engine: str, program: torch.export.ExportedProgram, folder: Path) -> Engine:
    target = import_module(TARGETS[engine])
    folder.mkdir(exist_ok=True)
    target.build(program, folder / target.FILE)
    return make_engine(engine, folder / target.FILE, num_threads=1)


def _compare(case: str, dynamic: Engine, fixed: Engine, x: torch.Tensor, seconds: float) -> list[Row]:
    inputs = [x if dynamic.takes == "torch" else x.numpy()]
    return ratios(case, {"dynamic": lambda: dynamic(inputs), "fixed": lambda: fixed(inputs)}, seconds=seconds)


if __name__ == "__main__":
    main()
