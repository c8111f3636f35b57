from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import DataError
from compress.quantize import calibrate, convert, prepare
from compress.quantize.corrections.bias import correct_biases
from compress.quantize.corrections.lockstep import float_twin
from compress.surgery import Captured
from compress.surgery.lengths import Length
from tests.networks import Residual, images


def calibrated(network: nn.Module, x: Tensor) -> Captured:
    prepared = prepare(network.eval(), [x[:2]], "int8")
    calibrate(prepared, [(x,)], ranges="minmax")
    return prepared


def test_by_hand() -> None:
    network: Any = nn.Sequential(nn.Linear(1, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        network[0].bias.copy_(torch.tensor([0.5, 0.0]))
    prepared = calibrated(network, torch.tensor([[0.0], [255.0]]))  # activations have scale 1 and no offset
    weight: Any = next(m for m in prepared.graph_module.modules() if getattr(m, "is_per_channel", False))
    weight.activation_post_process.max_val.copy_(127 * torch.tensor([0.75, 2.0]))  # scales 0.75 and 2
    # 10.4 and 20.4 become 10 and 20, the weights 0.75 and 2: the means 15.4 and 30.8 become 11.25 and 30.
    assert correct_biases(prepared, [(torch.tensor([[10.4]]),), (torch.tensor([[20.4]]),)]) == 1
    assert torch.allclose(network[0].bias, torch.tensor([0.5 + 15.4 - 11.25, 0.8]), atol=1e-4)


def means(network: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x).mean(0)


def test_each_channel_has_the_mean_of_the_float_network() -> None:
    torch.manual_seed(0)
    network, (x, _) = Residual(), images(96)
    for _ in range(5):
        network(x)
    prepared = calibrated(network, x)
    reference = float_twin(prepared)
    plain = convert(prepared)
    before = copy.deepcopy(network.state_dict())
    assert correct_biases(prepared, [(x[:40],), (x[40:],)]) == 4  # three BatchNorms, one bias
    expected = means(reference, x)
    assert torch.allclose(means(prepared.eval(), x), expected, atol=2e-3 * float(expected.abs().max()))
    assert float((means(convert(prepared), x) - expected).norm()) < 0.2 * float((means(plain, x) - expected).norm())
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"norm.bias", "norm1.bias", "norm2.bias", "fc.bias"}


def test_a_convolution_with_a_bias_before_a_batchnorm() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 1, 8, 8)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3, bias=False)
    )
    network(x)
    prepared = calibrated(network, x)
    assert correct_biases(prepared, [(x,)]) == 1  # the last layer has nothing to shift
    reference = float_twin(prepared)
    assert float((prepared.eval()(x) - reference(x)).norm() / reference(x).norm()) < 0.05


def test_no_data() -> None:
    with pytest.raises(DataError, match="expected at least one batch, got none"):
        correct_biases(calibrated(nn.Sequential(nn.Linear(2, 2)), torch.randn(4, 2)), [])


class Positions(nn.Module):
    """A BatchNorm whose channels are not the features of the linear in front."""

    def __init__(self, num_positions: int) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(num_positions)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


@pytest.mark.parametrize("num_positions", [5, 8])
def test_a_norm_over_another_dimension_is_shifted_along_it(num_positions: int) -> None:
    torch.manual_seed(0)
    network, x = Positions(num_positions), torch.randn(256, num_positions, 6) + 1
    network(x)
    prepared = prepare(network.eval(), [x[:2]], "w2a8", first_last="w2a8")
    calibrate(prepared, [(x,)])
    expected = network(x)
    assert float((prepared.eval()(x) - expected).mean((0, 2)).abs().max()) > 1e-3
    assert correct_biases(prepared, [(x,)]) == 1
    assert float((prepared.eval()(x) - expected).mean((0, 2)).abs().max()) < 1e-5


def test_batches_of_several_lengths_count_by_their_values() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 4)).eval()
    batches = [(torch.randn(4, 5, 6),), (torch.randn(2, 14, 6) + 1,)]
    prepared = prepare(network, batches[0], "w2a8", first_last="w2a8", lengths=[Length(1, 2, 16)])
    calibrate(prepared, batches)
    expected = [network(x) for (x,) in batches]
    assert correct_biases(prepared, batches) == 1
    errors = [(prepared.eval()(x) - wanted).flatten(0, 1) for (x,), wanted in zip(batches, expected)]
    assert float(torch.cat(errors).mean(0).abs().max()) < 1e-5
