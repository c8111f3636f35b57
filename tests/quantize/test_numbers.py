"""Every scheme's numerics against arithmetic by hand, on one linear layer and one convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.export.arithmetic import written_out
from compress.quantize import calibrate, convert, get_scheme, prepare
from compress.quantize.fakes.fake import best_scale
from compress.quantize.pt2e import num_quantized
from compress.surgery.capture import export_program
from tests.networks import images


def linear(num_inputs: int = 64) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(num_inputs, 5), torch.randn(16, num_inputs)


def outputs(network: nn.Module, x: Tensor, scheme: str, test: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what the fake-quantised and the converted network give, and what the latter stores."""
    prepared = prepare(copy.deepcopy(network), [x[:2]], scheme).eval()
    calibrate(prepared, [[x]], ranges="minmax")
    converted = convert(prepared)
    with torch.no_grad():
        return prepared(test), converted(test), converted.state_dict()


def int8_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    low, high = weight.amin(1), weight.amax(1)
    scale = torch.maximum(low / -128, high / 127)
    return (weight / scale[:, None]).round().clamp(-128, 127), scale


def affine(x: Tensor, low: float, high: float) -> tuple[Tensor, float, int]:
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (x / scale + zero).round().clamp(0, 255) - zero, scale, zero


def test_int8() -> None:
    net, x = linear()
    weights, steps = int8_weights(net.weight.detach())
    integers, scale, _ = affine(x, float(x.min()), float(x.max()))
    expected = (integers.int() @ weights.int().T).float() * scale * steps + net.bias.detach()
    for got in outputs(net, x, "int8", x)[:2]:
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "int8_portable"])
@pytest.mark.parametrize(("of_weights", "of_inputs"), [(1e-4, 1.0), (1.0, 1e-4), (1e-3, 1e-3)])
def test_int8_of_small_numbers_is_int8_of_large_ones(scheme: str, of_weights: float, of_inputs: float) -> None:
    """PyTorch's kernel has no steps below 6.1e-5, where 8 bits would be two or three."""
    net, x = linear()
    with torch.no_grad():
        net.bias.zero_()
        net.weight.mul_(of_weights)
    x = of_inputs * x
    expected = net(x)
    for got in outputs(net, x, scheme, x)[:2]:
        assert float((got - expected).norm() / expected.norm()) < 0.02


def test_a_row_far_below_the_others_keeps_steps_in_which_a_bias_can_be_counted() -> None:
    net, x = linear()
    with torch.no_grad():
        net.weight[1:3] *= torch.tensor([[1e-3], [1e-9]])
    _, _, state = outputs(net, x, "int8", x)
    (scales,) = [tensor for name, tensor in state.items() if tensor.shape == (5,) and "scale" in name]
    steps = int8_weights(net.weight.detach())[1]
    assert torch.allclose(scales[[0, 1, 3, 4]], steps[[0, 1, 3, 4]])
    assert float(scales[2]) == pytest.approx(float(steps.max()) / 4096)


def test_int8_portable_is_symmetric() -> None:
    net, x = linear()
    weights, steps = int8_weights(net.weight.detach())
    scale = float(x.abs().max()) / 127 * 255 / 254  # as PT2E's kernel has it for 255 integers around zero
    expected = ((x / scale).round().int() @ weights.int().T).float() * scale * steps + net.bias.detach()
    for got in outputs(net, x, "int8_portable", x)[:2]:
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.01])
def test_int8_dynamic_takes_the_range_of_each_batch(factor: float) -> None:
    net, x = linear()
    test = factor * x[:3]
    weights, steps = int8_weights(net.weight.detach())
    integers, scale, _ = affine(test, float(test.min()), float(test.max()))
    expected = (integers.int() @ weights.int().T).float() * scale * steps + net.bias.detach()
    for got in outputs(net, x, "int8_dynamic", test)[:2]:
        assert torch.allclose(got, expected, atol=1e-5)


def test_int8_weights_leaves_activations_alone() -> None:
    net, x = linear()
    weights, steps = int8_weights(net.weight.detach())
    expected = x @ (weights * steps[:, None]).T + net.bias.detach()
    fake, integer, state = outputs(net, x, "int8_weights", x)
    assert torch.allclose(fake, expected, atol=1e-5)
    assert torch.allclose(integer, expected, atol=1e-5)
    assert [t.dtype for t in state.values() if t.dim() == 2] == [torch.int8]


@pytest.mark.parametrize(
    ("scheme", "num_inputs", "size"), [("int4_weights", 64, 32), ("int4_weights_64", 128, 64), ("int4_weights", 50, 50)]
)
def test_int4_weights_have_a_scale_for_each_group(scheme: str, num_inputs: int, size: int) -> None:
    """One for the whole row, where groups do not fit."""
    net, x = linear(num_inputs)
    groups = net.weight.detach().reshape(-1, size)
    scale = best_scale(groups, -8, 7, steps=30)
    integers = (groups / scale[:, None]).round().clamp(-8, 7)
    expected = x @ (integers * scale[:, None]).reshape(5, num_inputs).T + net.bias.detach()
    fake, integer, state = outputs(net, x, scheme, x)
    assert torch.allclose(fake, expected, atol=1e-5)
    assert torch.allclose(integer, expected, atol=1e-5)
    (stored,) = [t for t in state.values() if t.dtype == torch.int8]
    assert stored.shape == (5, num_inputs // size, size)
    assert torch.equal(stored.flatten(1).float(), integers.reshape(5, num_inputs))
    assert "weight" not in state


def test_int16x8_rounds_activations_to_65535_steps() -> None:
    net, x = linear()
    weights, steps = int8_weights(net.weight.detach())
    scale = float(x.abs().max()) / 32767
    expected = ((x / scale).round().long() @ weights.long().T).double() * scale * steps.double() + net.bias.detach()
    for got in outputs(net, x, "int16x8", x)[:2]:
        assert torch.allclose(got.double(), expected, atol=1e-5)


def float8(values: Tensor) -> Tensor:
    """Round to 3 bits behind the leading one, or to multiples of 2 ** -9 below 2 ** -6: e4m3 by its definition."""
    exponent = values.abs().clamp(min=2.0**-6).log2().floor()
    step = 2.0 ** (exponent - 3)
    return (values / step).round() * step


def test_fp8_by_the_definition_of_e4m3() -> None:
    net, x = linear()
    steps = net.weight.detach().abs().amax(1) / 448
    scale = float(x.abs().max()) / 448
    weight = float8(net.weight.detach() / steps[:, None]) * steps[:, None]
    test = 2 * x  # beyond the range: clipped, where a cast alone would give NaN
    expected = float8((test / scale).clamp(-448, 448)) * scale @ weight.T + net.bias.detach()
    fake, narrow, state = outputs(net, x, "fp8", test)
    assert torch.allclose(fake, expected, atol=1e-4)
    assert torch.allclose(narrow, expected, atol=1e-4)
    assert [t.dtype for t in state.values() if t.dim() == 2 and t.shape[1] > 1] == [torch.float8_e4m3fn]


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weights", "int16x8", "fp8"])
def test_each_scheme_trains_converts_and_becomes_the_portable_program(scheme: str) -> None:
    """A convolution, a BatchNorm and a linear layer; schemes for linear layers leave convolutions alone."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    )
    x, y = images(32)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    prepared = prepare(network, [x[:2]], scheme).train()
    assert num_quantized(prepared) == (1 if get_scheme(scheme).linear_only else 2)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(x), y).backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in prepared.named_parameters())
    converted = convert(prepared)
    with torch.no_grad():
        fake, got = prepared.eval()(x), converted(x)
    assert float((fake - got).norm() / fake.norm()) < 5e-3
    plain = export_program(converted, [x[:2]]).run_decompositions(written_out()).module()
    with torch.no_grad():
        assert torch.allclose(plain(x), got, atol=1e-4)
