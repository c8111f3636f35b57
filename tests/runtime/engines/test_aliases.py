"""Whoever writes to an output changes that alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.export import export_artifact
from compress.export.targets.inductor_cuda import compile_artifact
from compress.runtime import load
from compress.runtime.engines.inductor_cuda import load_artifact
from compress.surgery.capture import export_program
from tests.export.programs import HERE

ENGINES = [name for name in HERE if name in ("eager", "aoti")]


class Views(nn.Module):
    """Gives a product, constants as they are and folded, the input, and views of these."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.row = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("shared", torch.randn(3))
        self.shared: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, num = self.linear(x), x.shape[0]
        constants = [self.shared.expand(num, 3), self.row.expand(num, 5), (self.row * 2).expand(num, 5)]
        return y, *constants, x, x[:, 1:], y.view(-1, 2, 2), y[:, :2], y, y.unfold(1, 2, 1)


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network, x = Views().eval(), torch.randn(32, 6)
    program, path = export_program(network, [x[:4]]), tmp_path_factory.mktemp("views") / "a"
    export_artifact(program, path, targets=ENGINES, reference=network, held_out=[x])
    return path


def change_each(call: Any, x: Any) -> None:
    wanted = [value.copy() if hasattr(value, "copy") else value.clone() for value in call(x)]
    given = x.copy() if hasattr(x, "copy") else x.clone()
    for place in range(len(wanted)):
        outputs = call(x)
        outputs[place][...] = 7
        assert (x == given).all()
        assert [bool((a == b).all()) for a, b in zip(outputs, wanted)] == [i != place for i in range(len(wanted))]
    assert all((a == b).all() for a, b in zip(call(x), wanted))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_output_is_memory_of_its_own(engine: str, views: Path) -> None:
    model = load(views, engine=engine)
    for num in (1, 5):
        x = torch.randn(num, 6)
        change_each(model, x)
        change_each(model, x.numpy())


@pytest.mark.slow
def test_an_output_of_what_inductor_compiled_is_memory_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Views().eval(), torch.randn(5, 6)
    compile_artifact(export_program(network, [x]), tmp_path / "file.pt")
    run = load_artifact(tmp_path / "file.pt", "cpu")
    change_each(lambda value: run([value]), x)
