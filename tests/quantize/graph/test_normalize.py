from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quantize import calibrate, convert, prepare
from compress.quantize.graph.normalize import normalize
from compress.quantize.pt2e import num_quantized
from compress.surgery import capture

_aten = torch.ops.aten


class Written(nn.Module):
    """Products and sums as people write them."""

    def __init__(self, forward: Callable[[Written, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.layer = nn.Linear(8, 8)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def _reset(network: nn.Module) -> nn.Module:
    """Give BatchNorms statistics that are not those of a new one."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return network


IMAGES, SERIES, ROWS = torch.randn(4, 8, 7, 7), torch.randn(4, 8, 12), torch.randn(4, 5, 8)
VOLUMES = torch.randn(4, 8, 4, 5, 5)
VOLUME_NET = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8, eps=1e-3), nn.ReLU(), nn.Conv3d(8, 2, 1))
SERIES_NET = nn.Sequential(
    nn.Conv1d(8, 6, 3, stride=2, padding=1, bias=False),
    nn.BatchNorm1d(6),
    nn.ReLU(),
    nn.Conv1d(6, 6, 3, padding=2, dilation=2, groups=3),
    nn.Flatten(),
    nn.Linear(36, 3),
)
CASES: dict[str, tuple[nn.Module, Tensor, int]] = {
    "same": (nn.Conv2d(8, 4, 3, padding="same"), IMAGES, 1),
    "same, even kernel": (nn.Conv2d(8, 4, (4, 3), padding="same", dilation=(1, 2)), IMAGES, 1),
    "valid": (nn.Conv2d(8, 4, 3, padding="valid", stride=2), IMAGES, 1),
    "same, series": (nn.Conv1d(8, 4, 4, padding="same"), SERIES, 1),
    "constant": (Written(lambda own, x: F.relu(own.conv(x) + 0.5)), IMAGES, 1),
    "from nothing": (Written(lambda own, x: F.relu(sum([own.conv(x), x]))), IMAGES, 1),  # type: ignore[arg-type]
    "matmul": (Written(lambda own, x: x @ own.weight + own.bias), ROWS, 1),
    "addmm": (Written(lambda own, x: torch.addmm(own.bias, x[:, 0], own.weight)), ROWS, 1),
    "mm": (Written(lambda own, x: torch.mm(x[:, 1], own.weight)), ROWS, 1),
    "einsum": (Written(lambda own, x: torch.einsum("btc,cd->btd", x, own.weight)), ROWS, 1),
    "einsum, turned": (Written(lambda own, x: torch.einsum("dt,bct->dbc", own.weight.t(), x)), ROWS, 1),
    "integers": (Written(lambda own, x: own.layer(x) * ((x > 0).long() * (x > 1).long())), ROWS, 1),
    "series": (_reset(SERIES_NET), SERIES, 3),
    "volumes": (_reset(VOLUME_NET), VOLUMES, 2),
    "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), ROWS, 4),
    "method": (Written(lambda own, x: own.layer(x).relu()), ROWS, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_stay(name: str) -> None:
    network, x, _ = CASES[name]
    captured = capture(network.eval(), [x[:2]])
    names = captured.state_dict().keys()
    normalize(captured.graph_module)
    with torch.no_grad():
        expected, got = network(x), captured(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert captured.state_dict().keys() == names


@pytest.mark.parametrize("name", CASES)
def test_products_become_integers_and_agree(name: str) -> None:
    network, x, num = CASES[name]
    prepared = prepare(network.eval(), [x[:2]], "int8")
    assert num_quantized(prepared) == num
    calibrate(prepared, [(x,)], ranges="minmax")
    converted = convert(prepared)
    with torch.no_grad():
        expected, fake, integer = network(x), prepared(x), converted(x)
    assert float((fake - expected).norm() / expected.norm()) < 0.05
    assert float((integer - fake).norm() / fake.norm()) < 0.01
    assert sum(tensor.dtype == torch.int8 for tensor in converted.state_dict().values()) == num


def test_a_layer_that_is_called_twice() -> None:
    layer = nn.Linear(8, 8)
    prepared = prepare(nn.Sequential(layer, nn.ReLU(), layer).eval(), [ROWS[:2]], "int8")
    assert num_quantized(prepared) == 2
    calibrate(prepared, [(ROWS,)])
    with torch.no_grad():
        torch.testing.assert_close(convert(prepared)(ROWS), prepared(ROWS), atol=0.02, rtol=0.02)


def test_it_trains_what_was_rewritten() -> None:
    torch.manual_seed(0)
    prepared = prepare(SERIES_NET.train(), [SERIES[:2]], "int8")
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    F.cross_entropy(prepared(SERIES), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    for name, _ in SERIES_NET.named_parameters():
        assert not torch.equal(prepared.state_dict()[name], before[name]), name
    assert not torch.equal(prepared.state_dict()["1.running_mean"], before["1.running_mean"])


def test_series_stay_images_between_convolutions() -> None:
    captured = capture(SERIES_NET.eval(), [SERIES[:2]])
    normalize(captured.graph_module)
    targets = [node.target for node in captured.graph_module.graph.nodes]
    assert targets.count(_aten.conv2d.default) == 2
    assert targets.count(_aten.squeeze.dim) == 1
    assert targets.count(_aten.unsqueeze.default) == 3  # the input and two weights


def test_integers_are_not_observed() -> None:
    network, x, _ = CASES["integers"]
    prepared = prepare(network.eval(), [x[:2]], "int8")
    for node in prepared.graph_module.graph.nodes:
        if node.op == "call_module":
            assert node.args[0].meta["val"].dtype.is_floating_point


def test_rows_of_one_sign_have_their_zero_in_the_middle() -> None:
    """Engines take no zero point for weights; PyTorch's kernel would give one to a row that is never negative."""
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.abs_()
        layer.weight[1] *= -1
    prepared = prepare(nn.Sequential(layer).train(), [ROWS[:2]], "int8")
    for _ in range(3):
        prepared(ROWS)
    calibrated = prepare(nn.Sequential(layer).eval(), [ROWS[:2]], "int8")
    calibrate(calibrated, [(ROWS,)])
    for network in (prepared, calibrated):
        found: list[Any] = [m for m in network.graph_module.modules() if getattr(m, "is_per_channel", False)]
        assert len(found) == 1
        assert found[0].zero_point.tolist() == [0] * 4
        with torch.no_grad():
            expected = layer.weight.abs().amax(1)
        torch.testing.assert_close(found[0].scale * 127.5, expected, atol=0.0, rtol=0.01)
