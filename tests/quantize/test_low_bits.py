"""Few bits: integers by hand, training, conversion, engines."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.quantize import calibrate, convert, prepare
from compress.quantize.fakes.fake import best_scale, scale_of
from compress.quantize.graph.annotate import PRODUCTS
from compress.quantize.layers import make_assignment, write_assignment
from compress.quantize.pt2e import describe_inputs, num_quantized, replay_quantize
from compress.surgery import Captured, Edit
from tests.networks import Residual, images


class Plain(nn.Module):
    """Four layers without BatchNorms, whose patterns PT2E takes seconds to look for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.conv1 = nn.Conv2d(8, 16, 3)
        self.conv2 = nn.Conv2d(16, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.conv1, self.conv2):
            x = torch.relu(layer(x))
        return self.fc(x.mean((2, 3)))


def network(kind: type[nn.Module] = Plain) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def fitted(net: nn.Module, scheme: str, steps: int = 6, **options: object) -> Captured:
    x, y = images(64)
    prepared = prepare(net, [x[:2]], scheme, **options).train()  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(x), y).backward()
        optimizer.step()
    return prepared


def integers(converted: Captured) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in converted.state_dict().items() if tensor.dtype == torch.int8}


@pytest.mark.parametrize("bits", range(2, 8))
def test_the_best_scale_is_no_worse_than_any_other_nearby(bits: int) -> None:
    torch.manual_seed(bits)
    rows, half = torch.randn(5, 200), 2 ** (bits - 1)

    def cost(scale: Tensor) -> Tensor:
        back = (rows / scale[:, None]).round().clamp(-half, half - 1) * scale[:, None]
        return ((back - rows) ** 2).sum(1)

    best = best_scale(rows, -half, half - 1, steps=30)
    clipping_nothing, _ = scale_of(rows.amin(1), rows.amax(1), -half, half - 1, symmetric=True)
    assert bool((cost(best) <= cost(clipping_nothing)).all())
    if bits <= 4:
        assert float((cost(best) / cost(clipping_nothing)).mean()) < 0.9
    one_more = best_scale(rows, -half, half - 1, start=best)
    assert bool((cost(one_more) <= cost(best) * (1 + 1e-5)).all())


def test_rows_of_zeros_have_a_scale() -> None:
    scale = best_scale(torch.zeros(2, 4), -8, 7, steps=3)
    assert bool((scale > 0).all())


@pytest.mark.parametrize(("kind", "scheme"), [(Plain, "w2a8"), (Residual, "w3a3"), (Plain, "w7a2")])
def test_it_trains_and_becomes_the_integers_that_it_was_trained_as(kind: type[nn.Module], scheme: str) -> None:
    bits = int(scheme[1])
    before = {name: p.detach().clone() for name, p in network(kind).named_parameters()}
    prepared = fitted(network(kind), scheme)
    assert all(not torch.equal(p, before[name]) for name, p in prepared.named_parameters())
    x, _ = images(64, seed=1)
    converted = convert(prepared)
    with torch.no_grad():
        fake, integer = prepared.eval()(x), converted(x)
    assert float((fake - integer).norm() / fake.norm()) < 1e-2
    lows, highs = zip(*((int(t.min()), int(t.max())) for t in integers(converted).values()))
    half = 2 ** (bits - 1)
    few = [-half <= low and high < half for low, high in zip(lows, highs)]
    assert len(few) == 4
    assert sum(few) == 2 if bits < 7 else sum(few) >= 2  # the first and the last layer have eight
    assert max(highs) > 63


def test_a_linear_layer_by_integer_arithmetic() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    x = torch.randn(32, 6)
    prepared = prepare(copy.deepcopy(linear), [x[:2]], "w3a4", first_last="w3a4").eval()
    calibrate(prepared, [[x]], ranges="minmax")
    low, high = float(x.min()), float(x.max())
    scale = (high - low) / 15
    zero = round(-low / scale)
    steps = best_scale(linear.weight.detach(), -4, 3, steps=30)
    weights = (linear.weight / steps[:, None]).round().clamp(-4, 3).int()
    test = 2 * x  # beyond the range: clipped to four bits, not to the eight that they are stored in
    activations = (test / scale + zero).round().clamp(0, 15).int()
    expected = ((activations - zero) @ weights.T).float() * scale * steps + linear.bias
    with torch.no_grad():
        converted = convert(prepared)
        assert torch.allclose(prepared(test), expected, atol=1e-5)
        assert torch.allclose(converted(test), expected, atol=1e-5)
    (stored,) = integers(converted).values()
    assert torch.equal(stored.int(), weights)


def test_few_bits_lie_closer_after_calibration_than_ranges_that_clip_nothing() -> None:
    """And layers that keep eight bits, or floats, do."""
    net, (x, _) = network().eval(), images(64)
    prepared = prepare(net, [x[:2]], "w4a8", layers={"conv2": "float"})
    assert num_quantized(prepared) == 3
    calibrate(prepared, [[x]])
    converted = convert(prepared)
    assert len(integers(converted)) == 3
    floats = [name for name, t in converted.state_dict().items() if t.dim() == 4 and t.dtype == torch.float32]
    assert floats == ["conv2.weight"]
    with torch.no_grad():
        wanted, got = net(x), converted(x)
    assert float((wanted - got).norm() / wanted.norm()) < 0.15


def test_a_value_that_goes_to_layers_of_different_bits_is_rounded_for_each_alone() -> None:
    prepared = fitted(network(), "w4a2", steps=1)
    graph = prepared.graph_module
    products = [node for node in graph.graph.nodes if node.target in PRODUCTS]
    assert [graph.get_submodule(node.args[0].target).quant_max for node in products] == [255, 3, 3, 255]
    for node in graph.graph.nodes:
        if node.op == "call_module":
            assert node.args[0].op != "call_module", "rounded twice"


def test_the_edit_holds_all_that_replay_needs() -> None:
    prepared = fitted(network(), "w3a4", layers={"conv2": "w5a8"}, first_last="float")
    inputs = [torch.zeros(2, 1, 8, 8)]
    data = write_assignment(make_assignment("w3a4", layers={"conv2": "w5a8"}, first_last="float"))
    edit = Edit("quantize", {**data, "inputs": describe_inputs(inputs)})
    again = replay_quantize(network(), edit)
    again.load_state_dict(prepared.state_dict())
    x, _ = images(8)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), prepared.eval()(x))
