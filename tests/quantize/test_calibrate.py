from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import DataError, EditError, RecipeError
from compress.quantize import RANGES, calibrate, convert, make_assignment, parametrize, prepare
from compress.quantize.calibrate import float_mode
from compress.quantize.pt2e import num_quantized
from compress.surgery import Captured
from tests.networks import Residual, images


def fake_quantizers(prepared: Captured) -> tuple[list[Any], list[Any]]:
    """Return those of activations and those of weights."""
    found: list[Any] = [module for module in prepared.graph_module.modules() if hasattr(module, "fake_quant_enabled")]
    return [m for m in found if not m.is_per_channel], [m for m in found if m.is_per_channel]


@pytest.fixture(scope="module")
def trained() -> Residual:
    torch.manual_seed(0)
    network, (x, y) = Residual(), images(256)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize("scheme", ["int8", "int8_portable"])
def test_the_result_is_integer_arithmetic_by_hand(scheme: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(32, 6)
    prepared = prepare(nn.Sequential(layer), [x[:2]], scheme)
    calibrate(prepared, [(x,)], ranges="minmax")
    low, high = float(x.min()), float(x.max())
    if scheme == "int8":
        scale = (high - low) / 255
        zero = round(-low / scale)
    else:
        scale, zero = max(-low / 128, high / 127) * 255 / 254, 127
    rows = layer.weight.detach()
    scales = torch.maximum(-rows.amin(1) / 128, rows.amax(1) / 127)
    integers = torch.round(rows / scales[:, None]).clamp(-128, 127)
    given = torch.round(x / scale + zero).clamp(0, 255 if scheme == "int8" else 254)
    expected = ((given - zero) @ integers.T) * scale * scales + layer.bias.detach()
    with torch.no_grad():
        assert torch.allclose(prepared.eval()(x), expected, atol=1e-5)
        assert torch.allclose(convert(prepared)(x), expected, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "int8_portable"])
@pytest.mark.parametrize("ranges", ["minmax", "average", "percentile", "mse"])
def test_nothing_is_trained_and_little_is_lost(trained: Residual, scheme: str, ranges: str) -> None:
    x, _ = images(256)
    before = copy.deepcopy(trained.state_dict())
    prepared = prepare(copy.deepcopy(trained), [x[:2]], scheme)
    assert calibrate(prepared, [(x[:100],), (x[100:200],), (x[200:],)], ranges=ranges) == 3  # the last is smaller
    for name, tensor in before.items():
        if name in prepared.state_dict():
            assert torch.equal(prepared.state_dict()[name], tensor), name
    with torch.no_grad():
        expected, got = trained(x), convert(prepared)(x)
        with float_mode(prepared.eval()):
            assert torch.allclose(prepared(x), expected, atol=1e-4)
    assert float((got - expected).norm() / expected.norm()) < 0.04


def test_portable_activations_are_symmetric(trained: Residual) -> None:
    prepared = prepare(copy.deepcopy(trained), [images(2)[0]], "int8_portable")
    calibrate(prepared, [(images(64)[0],)])
    activations, weights = fake_quantizers(prepared)
    assert {int(module.zero_point[0]) for module in activations} == {127}
    assert {int(zero) for module in weights for zero in module.zero_point} == {0}


def test_the_mode_stays_and_rounding_is_on_again(trained: Residual) -> None:
    prepared = prepare(copy.deepcopy(trained), [images(2)[0]], "int8").train()
    calibrate(prepared, [(images(8)[0],)])
    assert prepared.training
    assert all(int(m.fake_quant_enabled[0]) == 1 for part in fake_quantizers(prepared) for m in part)


def test_ranges_come_back_with_the_weights(trained: Residual) -> None:
    x, _ = images(64)
    prepared = prepare(copy.deepcopy(trained), [x[:2]], "int8")
    calibrate(prepared, [(x,)])
    twin = prepare(Residual().eval(), [x[:2]], "int8")
    twin.load_state_dict(prepared.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), prepared.eval()(x))
        assert torch.equal(convert(twin)(x), convert(prepared)(x))


def test_a_channel_of_zeros_stays_zero() -> None:
    layer = nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.bias[1] = 0.25
    x = torch.randn(16, 5)
    prepared = prepare(nn.Sequential(layer), [x[:2]], "int8")
    calibrate(prepared, [(x,)])
    assert torch.equal(convert(prepared)(x)[:, 1], torch.full((16,), 0.25))


@pytest.mark.parametrize("scheme", ["int8", "int8_portable"])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_constant_activation_comes_back(scheme: str, value: float) -> None:
    layer, x = nn.Linear(3, 2), torch.full((8, 3), value)
    prepared = prepare(nn.Sequential(layer), [x[:2]], scheme)
    calibrate(prepared, [(x,)])
    with torch.no_grad():
        got, expected = convert(prepared)(x), layer(x)
    assert torch.allclose(got, expected, atol=0.03)


def test_layers_that_are_kept_are_exact(trained: Residual) -> None:
    x, _ = images(64)
    prepared = prepare(copy.deepcopy(trained), [x[:2]], "int8", keep=["stem", "conv*"])
    assert num_quantized(prepared) == 1
    only = prepare(copy.deepcopy(trained), [x[:2]], "int8", keep=["fc"])
    assert num_quantized(only) == 3
    calibrate(only, [(x,)])
    head = [n for n in only.graph_module.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [node.args[1].op for node in head] == ["get_attr"]
    kept = convert(only).state_dict()["fc.weight"]
    assert torch.equal(kept, trained.state_dict()["fc.weight"])


def test_a_pattern_without_a_layer_is_named(trained: Residual) -> None:
    with pytest.raises(RecipeError, match=r"quantize\.keep: .*got 'head\*'.*The layers are: stem, conv1, conv2, fc"):
        prepare(copy.deepcopy(trained), [images(2)[0]], "int8", keep=["head*"])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "expected at least one batch, got none"),
        ([(torch.zeros(4, 1, 8),)], r"expected batches .*\(N, 1, 8, 8\).*got \(N, 1, 8\)"),
        ([(torch.zeros(4, 1, 8, 8), torch.zeros(4))], "Give what the network takes, without targets"),
        ([(images(8)[0],), (torch.empty(0, 1, 8, 8),)], "expected samples in each batch, got a batch of none"),
        ([(images(8)[0].double(),)], r"\(N, 1, 8, 8\) float32, got \(N, 1, 8, 8\) float64"),
        ([(torch.full((4, 1, 8, 8), math.nan),)], "finite activations, got others in what 'stem' takes"),
    ],
)
def test_bad_data_is_refused_and_changes_nothing(
    trained: Residual, batches: list[tuple[Tensor, ...]], message: str
) -> None:
    prepared = prepare(copy.deepcopy(trained), [images(2)[0]], "int8").train()
    calibrate(prepared, [(images(8)[0],)])
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(DataError, match=message):
        calibrate(prepared, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())
    assert prepared.training


@pytest.mark.parametrize("fallback", [False, True])
def test_what_is_not_finite_is_named_by_the_layer_that_takes_it(trained: Residual, fallback: bool) -> None:
    network = copy.deepcopy(trained)
    with torch.no_grad():
        network.conv1.weight[3] = math.inf
    assignment = make_assignment("int8")
    prepared = parametrize(network, assignment) if fallback else prepare(network, [images(2)[0]], assignment)
    with pytest.raises(DataError, match=r"got others in what 'conv2' takes\. Look for NaN"):
        calibrate(prepared, [(images(8)[0],)])


def test_bad_data_at_first_leaves_ranges_unknown(trained: Residual) -> None:
    prepared = prepare(copy.deepcopy(trained), [images(2)[0]], "int8_portable")
    with pytest.raises(DataError, match="expected finite activations"):
        calibrate(prepared, [(images(8)[0],), (torch.full((4, 1, 8, 8), math.nan),)])
    with pytest.raises(EditError, match="expected a range for what"):
        convert(prepared.eval())


def test_methods_differ(trained: Residual) -> None:
    x, _ = images(256)
    scales = set()
    for ranges in RANGES:
        prepared = prepare(copy.deepcopy(trained), [x[:2]], "int8")
        calibrate(prepared, [(x[i : i + 64],) for i in range(0, 256, 64)], ranges=ranges)
        scales.add(tuple(round(float(module.scale[0]), 9) for module in fake_quantizers(prepared)[0]))
    assert len(scales) == len(RANGES)
