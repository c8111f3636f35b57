from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ExportError
from compress.export import export_artifact
from compress.export.refused import check_operators
from compress.surgery.capture import export_program


class Layer(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def network(run: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Sequential(Layer(run))).eval()


def attend(dropout: float) -> Callable[[Tensor], Tensor]:
    return lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=dropout)[:, 0]


def filled(x: Tensor) -> Tensor:
    noise = torch.empty_like(x)
    noise.copy_(torch.rand_like(x))
    return x + noise


def unused(x: Tensor) -> Tensor:
    torch.rand([])  # as that of layers that are dropped in training
    return x


@pytest.mark.parametrize(
    ("run", "operator"),
    [
        (lambda x: x + 1e-7 * torch.randn_like(x), "randn_like"),
        (lambda x: x * x.new_empty(4).bernoulli_(0.9), "bernoulli_"),
        (filled, "rand_like"),
        (lambda x: F.dropout(x), "dropout"),
        (attend(0.1), "scaled_dot_product_attention"),
        (lambda x: torch.multinomial(x.softmax(1), 1), "multinomial"),
    ],
)
def test_random_numbers_are_refused_by_operator_and_layer(
    tmp_path: Path, run: Callable[[Tensor], Tensor], operator: str
) -> None:
    made, x = network(run), torch.randn(70, 6)
    program = export_program(made, [x[:2]])
    with pytest.raises(ExportError, match=rf"forward: .*got random numbers of aten\.{operator}\..* in '2\.0'\. Draw"):
        export_artifact(program, tmp_path / "a", targets=["eager"], reference=made, held_out=[x])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "run",
    [unused, attend(0.0), lambda x: F.dropout(x, 0.0), lambda x: F.dropout(x, training=False), lambda x: F.rrelu(x)],
)
def test_what_could_draw_but_does_not_passes(run: Callable[[Tensor], Tensor]) -> None:
    check_operators(export_program(network(run), [torch.randn(4, 6)]))


def test_recurrent_layers_with_dropout_pass_in_evaluation() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 4, 2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0][:, -1]

    check_operators(export_program(Last().eval(), [torch.randn(4, 3, 6)]))
    with pytest.raises(ExportError, match=r"random numbers of aten\.lstm\.input in 'lstm'"):
        check_operators(export_program(Last().train(), [torch.randn(4, 3, 6)]))


class Cast(nn.Module):
    """A layer in bfloat16, whatever its weights are, what comes before it and what follows it."""

    def __init__(self, then: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.then, self.before = nn.Linear(6, 4), then, before

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.fc(x)
        return self.then(y)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda y: y.float(), r"forward: expected no casts beside torch\.autocast"),
        (lambda y: y * 2, "output: expected a dtype that numpy has, got bfloat16"),
        (lambda y: y + torch.ones(4), None),
    ],
)
@pytest.mark.parametrize("before", [lambda x: x, lambda x: x.double().float()])
def test_autocast_in_forward_is_one_error_or_none(
    tmp_path: Path, then: Callable[[Tensor], Tensor], message: str | None, before: Callable[[Tensor], Tensor]
) -> None:
    x, made = torch.randn(70, 6), nn.Sequential(Cast(then, before)).eval()
    program = export_program(made, [x[:2]])
    with pytest.raises(ExportError, match=message) if message else nullcontext():
        export_artifact(program, tmp_path / "a", targets=["eager"], reference=made, held_out=[x])
    assert (tmp_path / "a").exists() == (message is None)
